"""Test the stopwatch and the logged rows of training steps."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import all_rows, make_config

from jaxgpt.runtime import step_log
from jaxgpt.runtime.distributed import StopSignal
from jaxgpt.runtime.metrics import Log
from jaxgpt.runtime.step_log import SkippedSteps, StepLog, Stopwatch


def test_stopwatch_measures_steps_without_pauses(monkeypatch):
    now = 0.0
    monkeypatch.setattr(step_log, "time", SimpleNamespace(perf_counter=lambda: now))
    watch = Stopwatch()
    now += 100  # compiling
    watch.resume()
    now += 3
    watch.lap(10)
    now += 5
    watch.lap(10)
    assert watch.read() == pytest.approx(8 / 20)
    now += 1
    watch.lap(1)
    now += 1000  # an evaluation
    watch.resume()
    now += 2
    watch.lap(1)
    assert watch.read() == pytest.approx(3 / 2)
    now += 7  # the device works on other steps while these are logged
    watch.lap(4)
    for _ in range(4):  # which are logged one by one
        assert watch.read() == pytest.approx(7 / 4)


def test_stopwatch_continues_the_seconds_of_earlier_sessions(monkeypatch):
    now = 50.0
    monkeypatch.setattr(step_log, "time", SimpleNamespace(perf_counter=lambda: now))
    watch = Stopwatch(train_s=100, total_s=130)
    now += 20  # compiling
    watch.resume()
    now += 3
    watch.lap(10)
    now += 4  # an evaluation
    assert (watch.train_s, watch.total_s) == (103, 157)
    watch.resume()
    now += 2
    watch.lap(10)
    assert watch.read() == pytest.approx(5 / 20)  # reading does not reset the totals
    assert (watch.train_s, watch.total_s) == (105, 159)


class Numbers(np.ndarray):
    """An array that a device may still compute."""

    has_ended = False

    def is_ready(self) -> bool:
        return self.has_ended


@pytest.mark.parametrize("has_ended", [False, True])
def test_steps_are_logged_at_log_interval_one_call_later_or_once_they_end(tmp_path, has_ended):
    config = make_config(out_dir=str(tmp_path), log_interval=2)
    with Log(config, 0) as log:
        watch, skipped = Stopwatch(), SkippedSteps()
        steps = StepLog(
            config, log, StopSignal(), 1000, peak=None, stopwatch=watch, skipped=skipped
        )
        for call in range(3):
            numbers = (np.arange(3.0) + 3 * call + 1).view(Numbers)  # one more than is taken
            numbers.has_ended = has_ended
            steps.launched(2 * call, 2, {"loss": numbers, "grad_norm": numbers, "lr": numbers})
            assert len(all_rows(config)) == (0, 2, 3, 4)[call + has_ended]
        steps.flush()
    rows = all_rows(config)
    assert [(row["step"], row["tokens"], row["mfu"]) for row in rows] == [
        (step, 1000 * step, None) for step in (1, 2, 4, 6)
    ]
    assert [row["loss"] for row in rows] == [1, 2, 5, 8]
