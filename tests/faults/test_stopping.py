"""Runs that are killed, or told to stop, at whatever moment: nothing is lost, no digit differs."""

import os
import random
import signal
import threading
from pathlib import Path

import pytest

from jaxgpt import train as loop
from jaxgpt.config import UserError
from jaxgpt.data.prepare import prepare
from jaxgpt.data.tokens import open_dataset
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.train import Trainer, train

from .harness import FORKS, TEXT, kill_at_random, outcome, rows_of, tiny
from .soak import soak

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_left_alone(tmp_path):
    killed = kill_at_random(tmp_path, 3, random.Random(0), save_interval=1)
    assert killed.failed == []
    assert killed.runs > 0
    assert killed.others == 0


@pytest.mark.slow
def test_a_long_run_under_faults_ends_as_if_left_alone(tmp_path, capsys):
    assert soak(tmp_path, 0.5, random.Random(0)), capsys.readouterr().out


PHASES = {
    "compile": (Trainer, "_compile"),
    "step": (Trainer, "_log_step"),
    "evaluation": (loop, "mean_loss"),
    "save": (Checkpoints, "save"),
    "save in the background": (Checkpoints, "_prune"),
    "sampling": (loop, "sample_text"),
}


NUMBERS = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("phase", "number"),
    [(phase, NUMBERS[i % 2]) for i, phase in enumerate(PHASES)]
    + [
        pytest.param(phase, NUMBERS[(i + 1) % 2], marks=pytest.mark.slow)
        for i, phase in enumerate(PHASES)
    ],
)
def test_a_signal_in_any_phase_saves_the_last_step(
    quiet, data, tmp_path, monkeypatch, phase, number
):
    stopped = tiny(tmp_path, data, sample_every=int(phase == "sampling"))
    owner, name = PHASES[phase]
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == {"compile": 1, "sampling": 1, "evaluation": 4}.get(phase, 2):
            signal.pthread_kill(threading.main_thread().ident, number)
        return function(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        code = train(stopped, {})
    last = max(row["step"] for row in rows_of(stopped))
    assert code == 128 + number
    assert last < stopped.max_iters
    assert run_dir.open_checkpoints(stopped).latest() == last
    assert train(stopped.replace(sample_every=0), {}) == 0
    assert outcome(stopped) == outcome(quiet)


def test_a_signal_in_a_dispatch_of_many_steps_saves_its_last(data, tmp_path, monkeypatch):
    """The signal comes while the third step of ten is logged, and ten more are on their way."""
    monkeypatch.setattr(Trainer, "_log_step", _then_stop(Trainer._log_step, at=3))
    config = tiny(tmp_path, data, save_interval=0, eval_interval=24)
    assert train(config, {}) == 128 + signal.SIGTERM
    assert rows_of(config)[-1]["step"] == 20
    assert run_dir.open_checkpoints(config).steps() == [20]


def _then_stop(function, at: int):
    def stop(self, step, numbers):
        function(self, step, numbers)
        if step == at:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    return stop


def _prepare(data_dir: Path, kill_at: int) -> None:
    """Prepares the text, and gets SIGTERM before it gives a file its name, the n-th time."""
    replace, left = Path.replace, [kill_at]

    def killing(self, target):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        left[0] -= 1
        return replace(self, target)

    Path.replace = killing
    prepare(str(data_dir / "tale.txt"), str(data_dir))


@pytest.mark.parametrize("kill_at", range(4))
def test_a_signal_while_data_is_prepared_leaves_nothing_half_written(data, tmp_path, kill_at):
    """Killed before each of the renames; made again, the files are those of a quiet run."""
    (tmp_path / "tale.txt").write_text(TEXT)
    process = FORKS.Process(target=_prepare, args=(tmp_path, kill_at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    folder, whole = tmp_path / "tale", data / "tale"
    names = {p.name for p in folder.iterdir() if ".partial" not in p.name}
    assert len(names) == kill_at
    with pytest.raises(UserError, match="interrupted"):
        open_dataset(folder, tmp_path, 8)
    names -= {"meta.json"}  # names the text by its path
    assert all((folder / n).read_bytes() == (whole / n).read_bytes() for n in names)
    prepare(str(tmp_path / "tale.txt"), str(tmp_path))
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    for file in whole.glob("*.bin"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
