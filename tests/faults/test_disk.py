"""A disk that is full, and a run directory that another run writes to."""

import errno
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxgpt.config import UserError
from jaxgpt.data.prepare import find_dataset
from jaxgpt.runtime import checkpoint, run_dir
from jaxgpt.train import Trainer, train

from .harness import FORKS, TRAIN, start, tiny

pytestmark = pytest.mark.usefixtures("quick")


def free(monkeypatch, *answers: float) -> None:
    left = list(answers)
    usage = lambda path: SimpleNamespace(free=left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(shutil, "disk_usage", usage)


def sound_step(config) -> int | None:
    checkpoints = run_dir.open_checkpoints(config)
    checkpoints.quarantine_corrupt()
    assert not checkpoints.damaged()
    return checkpoints.newest


def test_a_disk_without_room_is_refused_before_anything_is_compiled(data, tmp_path, monkeypatch):
    config = tiny(tmp_path, data)
    free(monkeypatch, 10_000)
    monkeypatch.setattr(Trainer, "_compile", lambda self: pytest.fail("compiles"))
    with pytest.raises(UserError, match=r"needs 0\.000 GB and the disk has .* nothing is saved"):
        train(config, {})


def test_a_disk_that_fills_up_ends_the_run_with_the_step_before_whole(data, tmp_path, monkeypatch):
    config = tiny(tmp_path, data)
    free(monkeypatch, 1e9, 1e9, 1e9, 10)  # at the start, and at steps 3 and 6; not at step 8
    with pytest.raises(UserError, match=r"a checkpoint needs .* step 6 is saved"):
        train(config, {})
    assert sound_step(config) == 6
    monkeypatch.undo()
    assert train(config, {}) == 0


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: x")]
)
def test_a_save_that_fails_in_the_background_is_told_at_the_next(
    data, tmp_path, monkeypatch, error
):
    config, digest = tiny(tmp_path, data), checkpoint.make_digest

    def full(step):
        if step.name == "6":
            raise error
        return digest(step)

    monkeypatch.setattr(checkpoint, "make_digest", full)
    with pytest.raises(UserError, match=r"6: could not be saved \([Nn]o space.*step 3 is saved"):
        train(config, {})
    last = json.loads(Path(config.out_dir, "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last <= 8  # the next save
    assert sound_step(config) == 3


CAN_MOUNT = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(CAN_MOUNT, capture_output=True).returncode != 0,
    reason="needs user namespaces",
)
def test_a_real_disk_that_is_full_in_the_middle_of_a_save(data, tmp_path):
    """A tmpfs of its own that holds few checkpoints; the check before a save is taken out."""
    config = tiny(tmp_path, data, n_embd=64, keep_checkpoints=50, save_interval=1)
    Path(config.out_dir).mkdir()
    mount = f"mount -t tmpfs -o size=6m none {config.out_dir}; "
    prefix = (
        "unshare",
        "-rm",
        "sh",
        "-c",
        mount + f'"$@"; r=$?; cp -r {config.out_dir} {tmp_path}/after; exit $r',
        "sh",
    )
    script = "from jaxgpt.runtime.checkpoint import Checkpoints as C; C.check_disk_space = lambda *a: None; "
    process = start(config, script + TRAIN, prefix)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert re.fullmatch(r"error: .*: could not be saved .*; step \d+ is saved\n", errors)
    after = config.replace(out_dir=str(tmp_path / "after"))
    assert (sound_step(after) or 0) > 1
    assert train(after.replace(keep_checkpoints=2), {}) == 0


# ---- one run at a time -----------------------------------------------------------------------


def test_a_run_directory_is_held_by_one_run(tmp_path):
    out_dir = str(tmp_path / "run")
    with run_dir.lock_run_dir(out_dir):
        with pytest.raises(UserError) as raised, run_dir.lock_run_dir(out_dir):
            pass
        assert str(raised.value) == f"out_dir={out_dir!r}: process {os.getpid()} is writing to it"
    with run_dir.lock_run_dir(out_dir):
        pass


def _hold(out_dir: str, is_held) -> None:
    with run_dir.lock_run_dir(out_dir):
        is_held.set()
        time.sleep(60)


def test_a_second_run_is_refused_and_a_dead_one_lets_go(data, tmp_path):
    config, is_held = tiny(tmp_path, data), FORKS.Event()
    first = FORKS.Process(target=_hold, args=(config.out_dir, is_held))
    first.start()
    assert is_held.wait(60)
    with pytest.raises(UserError, match=f"process {first.pid} is writing to it"):
        train(config, {})
    assert not Path(config.out_dir, "config.json").exists()
    first.kill()
    first.join()
    with run_dir.lock_run_dir(config.out_dir):
        pass


@pytest.mark.parametrize("nth", [0, 1])
def test_a_run_killed_while_it_clears_its_directory_can_be_started_again(
    quiet, tmp_path, monkeypatch, nth
):
    """Between the files that it writes there: config.json is whole at any moment."""
    shutil.copytree(quiet.out_dir, tmp_path / "run", symlinks=True)
    config, left, write = quiet.replace(out_dir=str(tmp_path / "run")), [nth], run_dir.atomic_write
    dataset = find_dataset(config, config.block_size)

    def killed(file, text):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(file, text)

    with monkeypatch.context() as patched:
        patched.setattr(run_dir, "atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            run_dir.create(config, dataset, fresh=True)
    run_dir.create(config, dataset, fresh=True)
    assert run_dir.load_config(config.out_dir) == config
