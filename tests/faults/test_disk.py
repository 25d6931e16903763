"""Test full disks, and a run directory that another run writes to."""

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import TRAIN_SCRIPT, refusal, rows_of, start

from jaxgpt.data.prepare import find_dataset
from jaxgpt.runtime import checkpoint, run_dir
from jaxgpt.train import train

from .harness import FORKS, tiny

pytestmark = pytest.mark.usefixtures("quick")


def set_free(monkeypatch, *answers: float) -> None:
    """Set the free disk space of successive queries; the last value repeats."""
    left = list(answers)
    usage = lambda path: SimpleNamespace(free=left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(shutil, "disk_usage", usage)


def sound_step(config) -> int | None:
    checkpoints = run_dir.open_checkpoints(config)
    checkpoints.quarantine_corrupt()
    assert not checkpoints.damaged()
    return checkpoints.newest


def test_full_disk_is_rejected_before_compilation(data, tmp_path, monkeypatch):
    set_free(monkeypatch, 10_000)
    loop, fail = sys.modules["jaxgpt.train"], lambda *args: pytest.fail("compiles")
    monkeypatch.setattr(loop, "make_train_step", fail)
    message = refusal(train, tiny(tmp_path, data))
    assert re.search(r"the disk has .* nothing is saved yet; expected 0\.000 GB", message)


def test_disk_filling_up_ends_the_run_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    config = tiny(tmp_path, data)
    set_free(monkeypatch, 1e9, 1e9, 1e9, 10)  # at the start, and at steps 3 and 6; not at step 8
    assert re.search("step 6 is saved; expected .* GB for a checkpoint", refusal(train, config))
    assert sound_step(config) == 6
    monkeypatch.undo()
    assert train(config) == 0


FULL = [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: x")]


@pytest.mark.parametrize("error", FULL)
def test_failed_save_is_reported_at_the_next_save(data, tmp_path, monkeypatch, error):
    config, write = tiny(tmp_path, data), checkpoint.atomic_write

    def full(file, text):
        if file.parent.name == "6":
            raise error
        write(file, text)

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    message = refusal(train, config)
    assert re.search(r"6: not saved \(no space.*step 3 is saved; try to free space", message)
    assert rows_of(config)[-1]["step"] <= 8  # the next save
    assert sound_step(config) == 3


CAN_MOUNT = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(CAN_MOUNT, capture_output=True).returncode != 0,
    reason="needs user namespaces",
)
def test_disk_full_during_a_save_keeps_earlier_checkpoints_resumable(data, tmp_path):
    """The run writes to a tmpfs that holds few checkpoints, without the check before a save."""
    config = tiny(tmp_path, data, n_embd=64, keep_checkpoints=50, save_interval=1)
    Path(config.out_dir).mkdir()
    shell = f"mount -t tmpfs -o size=6m none {config.out_dir}; "
    shell += f'"$@"; r=$?; cp -r {config.out_dir} {tmp_path}/after; exit $r'
    script = "from jaxgpt.runtime.checkpoint import Checkpoints as C; "
    script += "C.check_disk_space = lambda *args: None; " + TRAIN_SCRIPT
    process = start(config, script, ("unshare", "-rm", "sh", "-c", shell, "sh"))
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert re.fullmatch(r"error: .*: not saved .*, step \d+ is saved; try .*\n", errors)
    after = config.replace(out_dir=str(tmp_path / "after"))
    assert (sound_step(after) or 0) > 1
    assert train(after.replace(keep_checkpoints=2)) == 0


def _lock(out_dir: str, is_locked) -> None:
    with run_dir.lock_run_dir(out_dir):
        is_locked.set()
        time.sleep(60)


def test_second_writer_is_rejected_and_a_killed_writer_releases_the_lock(data, tmp_path):
    config, is_locked = tiny(tmp_path, data), FORKS.Event()
    first = FORKS.Process(target=_lock, args=(config.out_dir, is_locked))
    first.start()
    assert is_locked.wait(60)
    said = f"out_dir={config.out_dir!r}: process {{}} is writing to this run; expected "
    assert refusal(train, config).startswith(said.format(first.pid))
    assert not Path(config.out_dir, "config.json").exists()
    first.kill()
    first.join()
    with run_dir.lock_run_dir(config.out_dir):
        assert refusal(train, config).startswith(said.format(os.getpid()))
    with run_dir.lock_run_dir(config.out_dir):
        pass


@pytest.mark.parametrize("nth", [0, 1])
def test_run_interrupted_during_setup_can_start_again(quiet, tmp_path, monkeypatch, nth):
    """The interruption comes between two writes, so config.json is always complete."""
    shutil.copytree(quiet.out_dir, tmp_path / "run", symlinks=True)
    config, left = quiet.replace(out_dir=str(tmp_path / "run")), [nth]
    dataset, write = find_dataset(config, config.block_size), run_dir.atomic_write

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
