"""Log the numbers of every training step, one call behind the device."""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax

from jaxgpt.config import Config, UserError
from jaxgpt.runtime.distributed import StopSignal
from jaxgpt.runtime.metrics import Log, Row


class StepLog:
    """A log of training steps, which reads a call's numbers while the device runs the next call.

    `tokens` is the number of tokens per step, `peak` the tokens/s at the devices' peak FLOP/s.
    The `stopwatch` must have been resumed when the first call is launched.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        stop: StopSignal,
        tokens: int,
        peak: float | None,
        stopwatch: "Stopwatch",
        skipped: "SkippedSteps",
    ):
        self.config = config
        self.log = log
        self.stop = stop
        self.tokens = tokens
        self.peak = peak
        self.stopwatch = stopwatch
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None
        self.skipped = skipped

    def launched(self, step: int, count: int, metrics: dict[str, Any]) -> None:
        """Note a call that takes `count` steps from `step` on, and log the previous call.

        A call that ends before this is logged at once, so that its time is not the next call's.
        """
        is_alone = jax.process_count() == 1
        if not is_alone:
            metrics["signal"] = self.stop.highest()  # all processes must read it after one call
        self.flush()
        self._pending = step, count, metrics
        if is_alone and metrics["loss"].is_ready():
            self.flush()

    def flush(self) -> None:
        """Wait for the last call and log its steps.

        Raises `UserError` for a step that is not finite, unless the step may be skipped.
        """
        if self._pending is None:
            return
        before, count, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        self.stop.agreed = int(metrics.pop("signal", 0))
        self.stopwatch.lap(count)
        for i in range(count):
            step = before + 1 + i
            numbers = {key: float(values[i]) for key, values in metrics.items()}
            is_spike = numbers.pop("spike", 0.0) > 0
            self._check_finite(step, numbers["loss"], numbers["grad_norm"])
            if is_spike:
                self._log_spike(step, numbers["loss"], numbers["grad_norm"])
            if step % self.config.log_interval == 0 or step == 1:
                self._log_step(step, numbers)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped.in_a_row = 0
            return
        self.skipped.in_a_row += 1
        self.skipped.since_row += 1
        found = f"step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g}"
        if self.skipped.in_a_row > self.config.max_nonfinite_steps:
            raise UserError(
                f"{found}; expected finite numbers; try a lower --learning_rate, more "
                "--warmup_iters, a --grad_clip, or --max_nonfinite_steps=10 to skip single batches"
            )
        self.log.info(f"{found}; expected finite numbers; skipped this step")

    def _log_spike(self, step: int, loss: float, norm: float) -> None:
        self.skipped.since_row += 1
        limit = f"at most {self.config.skip_loss_spikes:g} standard deviations above the last steps"
        found = f"step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g}"
        self.log.info(f"{found}; expected {limit}; skipped this step")

    def _log_step(self, step: int, numbers: Row) -> None:
        seconds = self.stopwatch.read()
        rate = self.tokens / seconds
        row = {"step": step, **numbers, "tokens": step * self.tokens, "tokens_per_s": rate}
        row |= {"step_ms": 1000 * seconds, "time": time.time()}
        if self.config.max_nonfinite_steps or self.config.skip_loss_spikes:
            row["skipped"] = self.skipped.since_row
            self.skipped.since_row = 0
        row["mfu"] = rate / self.peak if self.peak else None
        self.log.train(row, seconds * (self.config.max_iters - step))


@dataclass
class SkippedSteps:
    """Counts of skipped steps, which go on when a run resumes."""

    since_row: int = 0  # since the last row of metrics.jsonl
    in_a_row: int = 0  # without a finite step between them


class Stopwatch:
    """A clock of a run's steps: the time per step since the last reading, and the run's total.

    `train_s` is the seconds spent in steps, without pauses; `total_s` includes the pauses. Both
    begin with the seconds of the run's earlier sessions.
    """

    def __init__(self, train_s: float = 0.0, total_s: float = 0.0):
        self.train_s = train_s
        self._began = time.perf_counter() - total_s
        self._steps = 0
        self._spent = 0.0
        self._seconds_per_step = 0.0
        self.resume()

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._began

    def resume(self) -> None:
        """Count the time since the last lap as a pause."""
        self._lap = time.perf_counter()

    def lap(self, steps: int) -> None:
        """Note that this many steps have just ended."""
        now = time.perf_counter()
        self._spent += now - self._lap
        self.train_s += now - self._lap
        self._steps += steps
        self._lap = now

    def read(self) -> float:
        """Return the seconds per step since the last reading; without new steps, repeat it."""
        if self._steps:
            self._seconds_per_step = self._spent / self._steps
        self._steps = 0
        self._spent = 0.0
        return self._seconds_per_step
