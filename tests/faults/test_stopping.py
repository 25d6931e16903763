"""Runs that are killed, or told to stop, at whatever moment: nothing is lost, no digit differs."""

import random
import signal
import threading
from pathlib import Path

import pytest

from jaxgpt import run_dir
from jaxgpt import train as loop
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.data.prepare import prepare
from jaxgpt.train import Trainer, train

from .harness import TEXT, kill_at_random, make_data, rows_of, start, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_left_alone(tmp_path):
    killed = kill_at_random(tmp_path, 3, random.Random(0), save_interval=1)
    assert killed.failed == []
    assert killed.runs > 0
    assert killed.others == 0


PHASES = {
    "compile": (Trainer, "_compile"),
    "step": (Trainer, "_log_step"),
    "evaluation": (loop, "mean_loss"),
    "save": (Checkpoints, "save"),
    "save in the background": (Checkpoints, "_prune"),
    "sampling": (loop, "sample_text"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_the_last_step(data, tmp_path, monkeypatch, phase, number):
    keys = {"sample_every": 1, "max_iters": 16}
    quiet, stopped = (tiny(tmp_path, data, name, **keys) for name in ("quiet", "stopped"))
    assert train(quiet, {}) == 0
    owner, name = PHASES[phase]
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == (1 if phase == "compile" else 4 if phase == "evaluation" else 2):
            signal.pthread_kill(threading.main_thread().ident, number)
        return function(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        code = train(stopped, {})
    last = max(row["step"] for row in rows_of(stopped))
    assert code == 128 + number
    assert run_dir.open_checkpoints(stopped).latest() == last
    assert train(stopped, {}) == 0
    assert rows_of(stopped) == rows_of(quiet)


PREPARE = """
import json, os, signal, sys
from pathlib import Path
from jaxgpt.data.prepare import prepare
replace, left = Path.replace, [{kill_at}]
def killing(self, target):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGTERM)
    left[0] -= 1
    return replace(self, target)
Path.replace = killing
data_dir = json.loads(sys.argv[1])["data_dir"]
prepare(data_dir + "/tale.txt", data_dir)
"""


@pytest.mark.parametrize("kill_at", range(4))
def test_a_signal_while_data_is_prepared_leaves_nothing_half_written(data, tmp_path, kill_at):
    """Killed before each of the renames; made again, the files are those of a quiet run."""
    (tmp_path / "tale.txt").write_text(TEXT)
    process = start(tiny(tmp_path, tmp_path), PREPARE.format(kill_at=kill_at))
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGTERM, errors
    folder, whole = tmp_path / "tale", data / "tale"
    names = {p.name for p in folder.iterdir() if not p.name.endswith(".partial")}
    assert len(names) == kill_at
    assert "meta.json" not in names
    assert all((folder / n).read_bytes() == (whole / n).read_bytes() for n in names)
    prepare(str(tmp_path / "tale.txt"), str(tmp_path))
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for file in whole.glob("*.bin"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
