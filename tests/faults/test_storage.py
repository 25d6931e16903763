"""Test runs in an object store: what is there, who may write, and what other commands read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest
from helpers import (
    ROOT,
    TEXT,
    TRAIN_SCRIPT,
    refusal,
    rows_of,
    set_val_losses,
    start,
    stop_at,
    write_config,
)

import jaxgpt
from jaxgpt.cli import commands as cli
from jaxgpt.data import prepare as prepares
from jaxgpt.data.prepare import find_dataset
from jaxgpt.data.text import CORPORA, Corpus, Download
from jaxgpt.runtime import distributed, lease, run_dir, storage
from jaxgpt.runtime.lease import Lease
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.train import train

from .harness import outcome

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def remote(short, bucket):
    """Return the config of a run like `short`, in the bucket."""
    return short.replace(out_dir=f"s3://{bucket.name}/some/run")


def step_names(bucket) -> set[str]:
    return {name.split("/")[0] for name in bucket.names("some/run/checkpoints")}


@pytest.mark.slow
def test_run_in_a_bucket_equals_a_local_run_and_leaves_the_same_files(short, remote, bucket):
    assert train(remote) == 0
    local = Path(short.out_dir)
    names = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    hashes = lambda names: {name for name in names if "/d/" not in name}  # named by their content
    assert hashes(bucket.names("some/run")) == hashes(names) - {".lock"} | {"checkpoints/best"}
    assert bucket.read("some/run/checkpoints/best").decode() == os.readlink(
        local / "checkpoints/best"
    )
    assert outcome(remote) == outcome(short)
    assert json.loads(bucket.read("some/run/config.json"))["out_dir"] == remote.out_dir
    mirror = storage.mirror_folder(remote.out_dir)
    assert {path.name for path in mirror.iterdir()} == {".lock", ".owners"}


@pytest.mark.slow
def test_stopped_run_resumes_on_another_machine(short, remote, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        assert train(remote) == 128 + signal.SIGTERM
    monkeypatch.setattr(storage, "MIRRORS", tmp_path / "other")
    assert train(remote) == 0
    assert outcome(remote) == outcome(short)


@pytest.mark.slow
def test_fresh_run_replaces_a_run_only_with_overwrite_and_keeps_other_objects(
    remote, bucket, monkeypatch
):
    bucket.write("some/run/notes/mine.txt", b"mine")
    bucket.write("some/run2/config.json", b"another run's")
    assert train(remote) == 0
    bucket.write("some/run/tensorboard/events.1", b"of the old run")
    before = bucket.names()
    fresh = remote.replace(init_from="scratch", max_iters=3)
    assert "try --init_from=resume" in refusal(train, fresh)
    assert bucket.names() == before
    assert train(fresh.replace(overwrite=True)) == 0
    assert step_names(bucket) == {"3", "best"}
    assert rows_of(fresh)[-1]["step"] == 3
    left = bucket.names()
    assert {"some/run/notes/mine.txt", "some/run2/config.json"} < left
    assert "some/run/tensorboard/events.1" not in left
    set_val_losses(monkeypatch, {0: 1.0, 3: 2.0})  # a run without a best step
    assert train(fresh.replace(overwrite=True)) == 0
    assert step_names(bucket) == {"3"}


@pytest.mark.slow
def test_damaged_step_is_quarantined_in_the_bucket(short, remote, bucket):
    assert train(remote) == 0
    name = next(n for n in sorted(bucket.names()) if "/6/state/params/ocdbt" in n and "/d/" in n)
    data = bytearray(bucket.read(name))
    data[len(data) // 2] ^= 1
    bucket.write(name, bytes(data))
    run = jaxgpt.load(remote.out_dir, checkpoint="latest")
    assert run.step == 3
    assert "some/run/checkpoints/6/digest.json" in bucket.names()  # readers change nothing
    with run_dir.lock_run_dir(remote.out_dir):
        checkpoints = run_dir.open_checkpoints(remote)
        checkpoints.quarantine_corrupt()
        assert checkpoints.newest == 3
    assert "some/run/checkpoints/6/digest.json.corrupt" in bucket.names()
    with run_dir.lock_run_dir(remote.out_dir):
        checkpoints = run_dir.open_checkpoints(remote)
        assert checkpoints.latest() == 3
        assert [path.name for path in checkpoints.damaged()] == ["6.corrupt"]
    assert train(remote) == 0
    assert outcome(remote) == outcome(short)
    assert not [name for name in bucket.names() if name.endswith(".corrupt")]


@pytest.mark.slow
def test_commands_read_a_run_from_a_bucket(remote, bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *args: None)  # JAX has started
    assert train(remote) == 0
    flags = [f"--out_dir={remote.out_dir}", "--device=cpu"]
    before = bucket.names()
    cli.sample([*flags, "--max_new_tokens=4", "--num_samples=1"])
    cli.evaluate([*flags, "--checkpoint=latest"])
    assert "step: 6" in capsys.readouterr().out
    cli.export([f"--out_dir={remote.out_dir}", f"--to={tmp_path / 'exported'}"])
    assert (tmp_path / "exported/config.json").exists()
    assert bucket.names() == before


@pytest.mark.slow
def test_report_is_written_to_the_bucket(remote, bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *args: None)  # JAX has started
    config = remote.replace(max_iters=3, report=True)
    assert cli.train([write_config(tmp_path / "remote.py", config.to_dict())]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{remote.out_dir}/report.html"
    bucket.delete("some/run/report.html")
    before = bucket.names()
    cli.report([remote.out_dir])
    assert capsys.readouterr().out == f"{remote.out_dir}/report.html\n"
    assert bucket.names() - before == {"some/run/report.html"}
    assert b"</html>" in bucket.read("some/run/report.html")


@pytest.mark.slow
def test_new_run_starts_from_weights_in_a_bucket(remote, tmp_path):
    assert train(remote) == 0
    finetuned = remote.replace(out_dir=str(tmp_path / "new"), init_from=remote.out_dir)
    assert train(finetuned.replace(max_iters=3)) == 0
    assert "weights of s3://" in Path(finetuned.out_dir, "log.txt").read_text()


def test_dataset_is_copied_from_a_bucket_once_and_again_when_it_changes(
    short, data, bucket, tmp_path, capsys
):
    def upload() -> None:
        for file in (data / "tale").iterdir():
            bucket.write(f"sets/tale/{file.name}", file.read_bytes())

    upload()
    keys = {"data_dir": f"s3://{bucket.name}/sets", "out_dir": str(tmp_path / "run")}
    config = short.replace(**keys)
    assert train(config) == 0
    assert outcome(config) == outcome(short)
    assert capsys.readouterr().err.count(f"{keys['data_dir']}/tale: copying 0.0 MB to ") == 1
    copy = next((tmp_path / "data").glob("*/tale/val.bin"))
    before = copy.stat().st_ino
    find_dataset(config, config.block_size)
    assert copy.stat().st_ino == before
    copy.write_bytes(b"")  # as if a copy was stopped
    meta = json.loads((data / "tale/meta.json").read_text())
    bucket.write("sets/tale/meta.json", json.dumps(meta | {"source": "another text"}).encode())
    assert find_dataset(config, config.block_size).source == "another text"
    assert copy.read_bytes() == (data / "tale/val.bin").read_bytes()
    old = copy.with_name("train_9.bin")  # a file that the bucket no longer has
    old.write_bytes(b"old")
    find_dataset(config, config.block_size)
    assert not old.exists()
    assert "no s3://" not in refusal(find_dataset, config.replace(dataset="none"), 8)


def test_corpus_that_the_bucket_lacks_is_prepared_on_this_machine(bucket, short, monkeypatch):
    def get_corpus(name: str, folder: Path) -> tuple[Path, str]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "input.txt").write_text(TEXT)
        return folder / "input.txt", "the Bard"

    monkeypatch.setattr(prepares, "get_corpus", get_corpus)
    monkeypatch.setitem(CORPORA, "bard", Corpus("the Bard", Download("", ""), "byte"))
    config = short.replace(data_dir=f"s3://{bucket.name}/sets", dataset="bard")
    for _ in range(2):
        assert len(find_dataset(config, config.block_size).train) > 100
    bucket.write("sets/bard/input.txt", TEXT.encode())  # the text alone, without token files
    for _ in range(2):
        assert len(find_dataset(config, config.block_size).train) > 100


def test_empty_object_that_stands_for_a_folder_is_ignored(short, data, bucket):
    """S3's console makes it when a user creates a folder."""
    bucket.write("sets/tale/", b"")
    for file in (data / "tale").iterdir():
        bucket.write(f"sets/tale/{file.name}", file.read_bytes())
    config = short.replace(data_dir=f"s3://{bucket.name}/sets")
    for _ in range(2):
        assert len(find_dataset(config, config.block_size).train) > 100


def test_object_that_is_deleted_while_it_is_read_is_named(remote, bucket, tmp_path):
    bucket.write("some/run/config.json", b"{}")
    reader = storage.Bucket(remote.out_dir, "out_dir")
    message = refusal(reader.download, tmp_path, {"config.json": 2, "gone.json": 2})
    assert "an object was deleted while it was read; expected" in message


@pytest.mark.slow
def test_each_process_downloads_the_weights_that_it_reads(remote, tmp_path, monkeypatch):
    assert train(remote) == 0
    monkeypatch.setattr(distributed, "on_process_0", lambda function: 6)  # as in process 1
    config = run_dir.load_config(remote.out_dir)
    params, step = run_dir.load_params(config, "latest", local_mesh())
    assert step == 6
    assert jax.tree.leaves(params)[0].size > 0


@pytest.mark.slow
def test_run_that_is_overwritten_leaves_no_step_with_the_new_config(remote, bucket, monkeypatch):
    assert train(remote) == 0
    monkeypatch.setattr(storage.Mirror, "_publish_files", killed)
    with pytest.raises(KeyboardInterrupt):
        train(remote.replace(init_from="scratch", overwrite=True, learning_rate=0.5))
    assert json.loads(bucket.read("some/run/config.json"))["learning_rate"] != 0.5
    assert not [name for name in bucket.names() if name.endswith("digest.json")]


@pytest.mark.slow
def test_best_step_is_published_from_a_cache_without_links(remote, bucket, monkeypatch):
    monkeypatch.setattr(Path, "symlink_to", Mock(side_effect=PermissionError(1, "no links")))
    assert train(remote) == 0
    assert bucket.read("some/run/checkpoints/best") in (b"3", b"6")


# ---- who may write ---------------------------------------------------------------------------


@pytest.fixture
def quick_lease(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "LEASE_S", 1.0)


def elsewhere(monkeypatch, tmp_path) -> None:
    """Let the next run believe that it is on another machine."""
    monkeypatch.setattr(storage, "MIRRORS", tmp_path / "elsewhere")
    monkeypatch.setattr(storage, "_mirrors", {})


def replace_or_create(self, name: str, data: bytes) -> bool:
    """Act as a store that ignores the condition that no object may be replaced."""
    self.write(name, data)
    return True


def test_second_writer_is_rejected_on_this_and_on_another_machine(
    remote, bucket, quick_lease, monkeypatch, tmp_path
):
    with run_dir.lock_run_dir(remote.out_dir):
        subject = f"out_dir={remote.out_dir!r}: process {os.getpid()} "
        assert refusal(train, remote).startswith(f"{subject}is writing to this run")
        elsewhere(monkeypatch, tmp_path)
        assert refusal(train, remote).startswith(f"{subject}on ")
        assert bucket.names("some/run") == {".lease"}
        monkeypatch.setattr(storage.Bucket, "create", replace_or_create)
        assert refusal(train, remote).startswith(f"{subject}on ")
    assert bucket.names() == set()


def test_lease_of_a_dead_writer_elsewhere_is_taken_over_after_a_wait(
    remote, bucket, quick_lease, capsys
):
    dead = {"owner": "dead", "host": "gone", "process": 7, "renewed": 3}
    bucket.write("some/run/.lease", json.dumps(dead).encode())
    with run_dir.lock_run_dir(remote.out_dir):
        pass
    assert "process 7 on gone held this run; waiting 1.0 s" in capsys.readouterr().err
    assert bucket.names() == set()


def killed(*args) -> None:
    raise KeyboardInterrupt


def test_lease_of_a_dead_writer_on_this_machine_is_taken_over_at_once(
    remote, bucket, monkeypatch, capsys
):
    bucket_lease(remote)._take()  # and never released, as after SIGKILL
    with monkeypatch.context() as patched:  # the next one is killed before it takes the lease
        patched.setattr(storage.Bucket, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            bucket_lease(remote)._take()
    assert bucket.names("some/run") == {".lease"}
    with run_dir.lock_run_dir(remote.out_dir):
        pass
    assert "waiting" not in capsys.readouterr().err
    assert bucket.names() == set()


def bucket_lease(config) -> Lease:
    mirror = storage.mirror_folder(config.out_dir)
    mirror.mkdir(parents=True, exist_ok=True)
    return Lease(storage.Bucket(config.out_dir, f"out_dir={config.out_dir!r}"), mirror)


def test_writer_that_has_lost_its_lease_uploads_no_further_step(remote, bucket, monkeypatch):
    taker = json.dumps({"owner": "other", "host": "there", "process": 8}).encode()
    upload = storage.Mirror._upload_step

    def upload_step(self, step):
        if step == "6":
            bucket.write("some/run/.lease", taker)
        upload(self, step)

    monkeypatch.setattr(storage.Mirror, "_upload_step", upload_step)
    message = refusal(train, remote)
    assert "process 8 on there has taken over this run" in message
    steps = {
        name.split("/")[0] for name in bucket.names("some/run/checkpoints") if "digest" in name
    }
    assert steps == {"3"}
    assert bucket.read("some/run/.lease") == taker


# ---- mistakes --------------------------------------------------------------------------------


def test_missing_extra_is_one_line_and_writes_nothing(remote, bucket, tmp_path):
    process = start(remote, "import sys; sys.modules['s3fs'] = None; " + TRAIN_SCRIPT)
    assert process.communicate()[1] == (
        f"error: out_dir={remote.out_dir!r}: needs s3fs; expected the extra cloud; "
        "try pip install 'jaxgpt[cloud]'\n"
    )
    assert process.returncode == 2
    assert bucket.names() == set()
    assert not (tmp_path / "home").exists()


def test_unusable_stores_are_rejected_in_one_line(remote, monkeypatch, tmp_path):
    absent = remote.replace(out_dir="s3://no-such-bucket/run")
    assert "the object store failed (FileNotFoundError: " in refusal(train, absent)
    assert "expected a folder, s3://bucket" in refusal(train, remote.replace(out_dir="ftp://a/b"))
    assert "no run in it" in refusal(run_dir.load_config, remote.out_dir)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "2 processes would write to an object store" in refusal(
        storage.mirror_folder, remote.out_dir
    )


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("ablate", ["--config=ablate", "--out_dir=s3://b/run"]),
        ("plan", ["--config=gpt2", "--data_dir=s3://b/data", "--topology=h100:8"]),
        ("prepare", ["text.txt", "--data_dir=s3://b/data"]),
        ("sample", ["--out_dir=s3://b/run", "--profile=1"]),
    ],
)
def test_commands_that_need_a_folder_say_so(command, argv, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *args: None)  # JAX has started
    assert "is in an object store; expected a folder" in refusal(cli.COMMANDS[command], argv)


def test_local_runs_import_no_object_store():
    code = "import sys, jaxgpt.train; print({'fsspec', 's3fs', 'gcsfs'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"
