"""Test that runs in an object store lose nothing when it fails, and when they are killed."""

import json
import random
import re
import subprocess
import threading
import time

import pytest
from helpers import refusal, start

from jaxgpt.runtime import bucket as buckets
from jaxgpt.runtime import run_dir, storage
from jaxgpt.train import train

from .harness import outcome, resumed_from, tiny
from .in_bucket import newest_step

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def remote(short, bucket):
    """Return the config of a run like `short`, in the bucket."""
    return short.replace(out_dir=f"s3://{bucket.name}/run")


def at_random(kinds: tuple[str, ...], rate: float, seed: int = 0):
    """Return faults of these kinds, for a share `rate` of the requests."""
    rng = random.Random(seed)
    return lambda request: rng.choice(kinds) if rng.random() < rate else ""


KINDS = {"errors": ("500", "503"), "breaks": ("half", "lost"), "delays": ("slow", "hang")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_single_failed_requests_are_repeated(short, remote, store, monkeypatch, kind):
    monkeypatch.setattr(buckets, "READ_S", 1)
    with store.disturbed(at_random(KINDS[kind], 0.05)) as faults:
        assert train(remote) == 0
        assert outcome(remote) == outcome(short)
    assert len(faults) > 2
    assert set(faults) <= set(KINDS[kind])


@pytest.mark.slow
def test_step_that_cannot_be_uploaded_is_uploaded_with_the_next_save(
    short, remote, store, bucket, monkeypatch, capsys
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    down = lambda request: "503" if request.startswith("PUT") and "/3/state" in request else ""
    with monkeypatch.context() as patched:
        count = []
        finish = storage.MirroredCheckpoints._finish

        def finish_once_down(self, step, meta, best):
            count.append(step.name)
            with store.disturbed(down if len(count) == 1 else lambda request: ""):
                finish(self, step, meta, best)

        patched.setattr(storage.MirroredCheckpoints, "_finish", finish_once_down)
        assert train(remote) == 0
    warning = r"warning: out_dir=.*: the object store failed .*; step 3 is uploaded with the next"
    assert re.search(warning, capsys.readouterr().err)
    assert {"3/digest.json", "6/digest.json"} <= bucket.names("run/checkpoints")
    assert outcome(remote) == outcome(short)


@pytest.mark.slow
def test_store_that_stays_down_ends_the_run_with_one_line_and_loses_no_saved_step(
    short, remote, store, bucket, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    down = lambda request: "503" if request.startswith("PUT") and "/6/" in request else ""
    with store.disturbed(down):
        assert "the object store failed" in refusal(train, remote)
    assert "3/digest.json" in bucket.names("run/checkpoints")
    assert "6/digest.json" not in bucket.names("run/checkpoints")
    assert train(remote) == 0
    assert outcome(remote) == outcome(short)


def test_step_that_cannot_be_read_is_not_taken_for_damaged(remote, store, bucket, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert train(remote) == 0
    before = bucket.names()
    down = lambda request: "500" if request.startswith("GET") and "/6/state" in request else ""
    with store.disturbed(down):
        assert "the object store failed" in refusal(train, remote)
    assert bucket.names() == before


@pytest.mark.slow
@pytest.mark.parametrize("part", ["/d/", "meta.json"])
def test_step_that_the_network_changes_is_read_again(remote, bucket, monkeypatch, part):
    """The first download of this part of a step has wrong bytes."""
    assert train(remote) == 0
    download, changed = storage.Bucket.download, []

    def download_changed(self, folder, sizes):
        download(self, folder, sizes)
        found = [folder / name for name in sizes if "/6/" in name and part in name]
        if found and not changed:
            changed.append(found[0])
            found[0].write_bytes(bytes(reversed(found[0].read_bytes())))

    monkeypatch.setattr(storage.Bucket, "download", download_changed)
    with run_dir.lock_run_dir(remote.out_dir):
        checkpoints = run_dir.open_checkpoints(remote)
        checkpoints.quarantine_corrupt()
        assert checkpoints.newest == 6
    assert changed


def test_step_is_kept_in_the_bucket_if_its_second_download_fails(remote, bucket, monkeypatch):
    """The first download of its meta.json has wrong bytes, and no other file can be read then."""
    assert train(remote) == 0
    before = bucket.names()
    download, changed = storage.Bucket.download, []

    def fail_later(self, folder, sizes):
        if changed:
            raise buckets.StoreError("here: the object store failed; expected an answer")
        download(self, folder, sizes)
        for name in sizes:
            if "/6/" in name and "meta.json" in name:
                changed.append(name)
                (folder / name).write_bytes(b"{}")

    monkeypatch.setattr(storage.Bucket, "download", fail_later)
    refusal(train, remote)
    assert changed
    assert bucket.names() == before


def test_metrics_are_uploaded_before_the_digest_of_their_step(remote, bucket, monkeypatch):
    """So a run that is killed between the two has the rows of the step from which it resumes."""
    upload, last_rows = storage.Bucket.upload, {}

    def look(self, folder, names):
        names = list(names)
        for name in names:
            if name.endswith("digest.json"):
                rows = bucket.read("run/metrics.jsonl").splitlines()
                last_rows[int(name.split("/")[1])] = json.loads(rows[-1])["step"]
        upload(self, folder, names)

    monkeypatch.setattr(storage.Bucket, "upload", look)
    assert train(remote) == 0
    assert last_rows.keys() == {3, 6}
    assert all(last >= step for step, last in last_rows.items())


# ---- SIGKILL ---------------------------------------------------------------------------------

MOMENTS = {  # the request that is never answered -> the newest step in the bucket then
    "arrays": ("/checkpoints/6/state/opt_state", 3),
    "digest": ("/checkpoints/6/digest.json", 3),
    "best": ("/checkpoints/best", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_during_an_upload_leaves_the_steps_before(short, remote, store, moment):
    part, newest = MOMENTS[moment]
    reached, killed = threading.Event(), threading.Event()

    def block(request: str) -> str:
        if not killed.is_set() and request.startswith("PUT") and part in request:
            reached.set()
            killed.wait(60)
            return "half"
        return ""

    with store.disturbed(block):
        process = start(remote)
        assert reached.wait(180)
        process.kill()
        process.communicate()
        killed.set()
        time.sleep(0.5)
    storage.open_to_read(remote.out_dir)
    found = run_dir.open_checkpoints(remote).latest()
    assert found == newest or (newest is None and found in (3, 6))
    assert train(remote) == 0
    assert outcome(remote) == outcome(short)


@pytest.mark.slow
def test_run_killed_ten_times_at_random_ends_bit_exact(data, bucket, tmp_path, monkeypatch):
    quiet = tiny(tmp_path, data, "local", save_interval=1)
    assert train(quiet) == 0
    remote, rng, kills = quiet.replace(out_dir=f"s3://{bucket.name}/run"), random.Random(0), 0
    saved = 0
    while kills < 10:
        process = start(remote)
        try:
            output, _ = process.communicate(timeout=rng.uniform(5, 20))
            assert process.returncode == 0
            assert resumed_from(output) == saved
            remote, saved = remote.replace(out_dir=f"s3://{bucket.name}/run{kills}"), 0
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            assert "compiled in" not in output or resumed_from(output) == saved
            saved = newest_step(remote)
            kills += 1
    assert train(remote) == 0
    assert outcome(remote) == outcome(quiet)
