"""Test that killed and stopped runs resume without losing steps or changing any digit."""

import random
import signal
import sys
import threading

import pytest
from helpers import TRAIN_SCRIPT, rows_of, start, stop_at

from jaxgpt.runtime import checkpoint, run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.runtime.metrics import Log
from jaxgpt.train import train

from .harness import kill_at_random, outcome, tiny
from .soak import soak

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_bit_exact(tmp_path):
    killed = kill_at_random(tmp_path, 3, random.Random(0), save_interval=1)
    assert killed.failed == []
    assert killed.runs > 0
    assert killed.others == 0


@pytest.mark.slow
def test_long_run_under_random_faults_ends_bit_exact(tmp_path, capsys):
    assert soak(tmp_path, 0.5, random.Random(0)), capsys.readouterr().out


LOOP, EVALUATE = sys.modules["jaxgpt.train"], sys.modules["jaxgpt.evaluate"]
# phase -> owner and name of a function of the phase, and the call that sends the signal
PHASES = {
    "compile": (LOOP, "make_train_step", 1),
    "step": (Log, "train", 2),
    "evaluation": (EVALUATE, "mean_loss", 4),
    "save": (Checkpoints, "save", 2),
    "save in the background": (checkpoint, "atomic_write", 4),
    "sampling": (LOOP, "generate_text", 1),
}
SIGTERM, SIGINT = signal.SIGTERM, signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_signal_in_any_phase_saves_the_last_step_and_resumes_bit_exact(
    quiet, data, tmp_path, monkeypatch, phase, number
):
    stopped = tiny(tmp_path, data, sample_every=int(phase == "sampling"))
    owner, name, at = PHASES[phase]
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            signal.pthread_kill(threading.main_thread().ident, number)
        return function(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        code = train(stopped)
    last = max(row["step"] for row in rows_of(stopped))
    assert code == 128 + number
    assert last < stopped.max_iters
    assert run_dir.open_checkpoints(stopped).latest() == last
    assert train(stopped.replace(sample_every=0)) == 0
    assert outcome(stopped) == outcome(quiet)


FAIL_AFTER_A_SAVE = """
from jaxgpt.config import UserError
from jaxgpt.runtime.checkpoint import Checkpoints
save = Checkpoints.save

def save_and_fail(self, *args, **keys):
    save(self, *args, **keys)
    raise UserError("here: a test; expected this")

Checkpoints.save = save_and_fail
"""


@pytest.mark.slow
def test_save_that_is_being_written_is_completed_when_the_run_fails(data, tmp_path):
    config = tiny(tmp_path, data)
    process = start(config, FAIL_AFTER_A_SAVE + TRAIN_SCRIPT)
    assert "here: a test" in process.communicate()[1]
    assert process.returncode == 2
    assert run_dir.open_checkpoints(config).latest() == 3


def test_signal_during_a_multi_step_call_saves_the_last_launched_step(data, tmp_path, monkeypatch):
    """The signal comes while step 3 of 10 is logged and the next 10 steps are in flight."""
    stop_at(monkeypatch, 3)
    config = tiny(tmp_path, data, save_interval=0, eval_interval=24)
    assert train(config) == 128 + signal.SIGTERM
    assert rows_of(config)[-1]["step"] == 20
    assert run_dir.open_checkpoints(config).steps() == [20]
