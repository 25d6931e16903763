"""The training loop: batch -> step -> log -> evaluate -> save, until the end or a signal."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import stages

from jaxgpt import spikes
from jaxgpt.config import Config, UserError
from jaxgpt.data.batches import Batches
from jaxgpt.data.text_stream import default_prompt, generate_text
from jaxgpt.evaluate import Evaluator
from jaxgpt.resolve import (
    EVAL_TRAIN,
    EVAL_VAL,
    TRAIN,
    Best,
    ResolvedRun,
    init_or_restore,
    make_batches,
    peak_tokens_per_s,
    resolve_run,
    summary,
    tokens_per_step,
)
from jaxgpt.runtime import distributed
from jaxgpt.runtime.distributed import StopSignal
from jaxgpt.runtime.metrics import Log
from jaxgpt.runtime.profile import Profiler
from jaxgpt.runtime.step_log import SkippedSteps, StepLog, Stopwatch
from jaxgpt.sample import Sampler
from jaxgpt.sharding import replicated
from jaxgpt.train_step import TrainState, make_train_step

SAMPLE_TOKENS = 200


def train(
    config: Config,
    cli_keys: frozenset[str] = frozenset(),
    notes: Sequence[str] = (),
    stop_signal: type[StopSignal] = StopSignal,
) -> int:
    """Train `config` to its end; return 0, or 128 + n if signal n arrived.

    JAX must have been started (`device.start`). `cli_keys` are the keys set on the command line,
    `notes` are lines for the log, and `stop_signal` records signals. Raises `UserError`. The host
    logs the metrics of the previous call while the device computes the current call, so the device
    never waits for the host.
    """
    with resolve_run(config, cli_keys) as run, open_log(run, notes) as log, stop_signal() as stop:
        config, step = run.config, run.resume_step
        stopwatch, skipped = resume_counts(run)
        batches = make_batches(config, run.mesh, run.dataset)
        state, best = init_or_restore(run)
        periodic = PeriodicWork(run, batches, best, log, stopwatch, skipped)
        if step == 0 or config.eval_only:
            periodic.evaluate(state, step, with_full_loss=config.eval_only)
        if config.eval_only:
            return stop.exit_code
        if step >= config.max_iters or best.reached_target:
            log.info(why_no_steps(config, best, step))
            return stop.exit_code
        distributed.on_process_0(partial(run.checkpoints.check_disk_space, state))
        peak = peak_tokens_per_s(config, run.mesh)
        step_log = StepLog(config, log, stop, tokens_per_step(config), peak, stopwatch, skipped)
        profiler = Profiler(config, log, step_log)
        phases, train_step = config.phases(), None

        next_pause = next_pause_after(config, step)
        while step < config.max_iters and not stop.signal and not best.ends_run:
            count = min(config.steps_per_call, next_pause - step)
            windows_UMBT = batches[TRAIN].get(step)  # windows of U steps; the call takes `count`
            if train_step is None or step in phases:
                train_step = compile_train_step(run, log, step, state, windows_UMBT)
                profiler.program = train_step
                stopwatch.resume()  # compiling, and what came before, is not step time
            profiler.before_call(step)
            state, metrics = train_step(state, windows_UMBT, np.int32(count))
            step_log.launched(step, count, metrics)  # logs the previous call, and updates `stop`
            step += count
            profiler.after_call(step, is_pause=step == next_pause)
            if step == next_pause:
                step_log.flush()
                periodic.evaluate_and_save(state, step)
                stopwatch.resume()  # evaluations are not step time
                next_pause = next_pause_after(config, step)
        step_log.flush()
        profiler.finish(step)
        periodic.finish(state, step)
        return stop.exit_code


# ---- before the first step -------------------------------------------------------------------


def open_log(run: ResolvedRun, notes: Sequence[str]) -> Log:
    """Open the run's log and write the first lines: device, data, model, and what was resumed."""
    log = Log(run.config, run.resume_step, enabled=distributed.is_process_0())
    for line in (*notes, *summary(run)):
        log.info(line)
    return log


def resume_counts(run: ResolvedRun) -> tuple[Stopwatch, SkippedSteps]:
    """Return the seconds and the skipped steps that the run's last checkpoint has recorded."""
    meta = run.checkpoints.meta(run.resume_step) if run.resume_step else {}
    stopwatch = Stopwatch(meta.get("train_s", 0.0), meta.get("total_s", 0.0))
    return stopwatch, SkippedSteps(**meta.get("skipped", {}))


def why_no_steps(config: Config, best: Best, step: int) -> str:
    """Return the line for a run that takes no steps, because it has reached its end or target."""
    if best.reached_target:
        key, advice = "target_val_loss", "a lower --target_val_loss"
        problem = f"the validation loss is {best.val_loss:.4f} at step {best.step}"
    else:
        key, advice = "max_iters", "a larger --max_iters"
        problem = f"step {step} is done"
    value = getattr(config, key)
    result = "so the run takes no more steps"
    return f"{key}={value}: {problem}, {result}; try {advice} to train further"


def compile_train_step(
    run: ResolvedRun, log: Log, step: int, state: TrainState, windows_UMBT: jax.Array
) -> stages.Compiled:
    """Compile the training step of the phase that `step` is in, and log how long that took."""
    began = time.perf_counter()
    phases = run.config.phases()
    config = phases[max(start for start in phases if start <= step)]
    train_step = make_train_step(config, run.mesh)
    arguments = state, windows_UMBT, np.int32(1)
    compiled = train_step.lower(*arguments).compile()  # now, not within the first step's time
    log.info(f"compiled in {time.perf_counter() - began:.1f} s")
    return compiled


# ---- between two steps -----------------------------------------------------------------------


def next_pause_after(config: Config, step: int) -> int:
    """Return the step of the next evaluation, save or phase, or else the last step."""
    intervals = [n for n in (config.eval_interval, config.save_interval) if n]
    phases = [start for start in config.phases() if start > step]
    return min(config.max_iters, *(step - step % n + n for n in intervals), *phases)


class PeriodicWork:
    """The evaluations, samples and saves of a run, which happen between two steps."""

    def __init__(
        self,
        run: ResolvedRun,
        batches: dict[int, Batches],
        best: Best,
        log: Log,
        stopwatch: Stopwatch,
        skipped: SkippedSteps,
    ):
        self.run, self.config, self.best, self.log = run, run.config, best, log
        self.stopwatch, self.skipped = stopwatch, skipped
        self.evaluator = Evaluator(run.config, run.mesh, batches[EVAL_TRAIN], batches[EVAL_VAL])
        self.sampler: Sampler | None = None
        whole = replicated(run.mesh)
        self.replicate = jax.jit(lambda tree: tree, out_shardings=whole)
        self.all_finite = jax.jit(all_finite, out_shardings=whole)

    def evaluate_and_save(self, state: TrainState, step: int) -> None:
        """Evaluate, log a sample and save, each if it is due at this step."""
        c = self.config
        is_last = step == c.max_iters
        is_eval = step % c.eval_interval == 0
        is_save = c.save_interval > 0 and step % c.save_interval == 0
        improved = False
        if is_eval or is_last:
            improved = self.evaluate(state, step, with_full_loss=is_last)
            if c.sample_every and step // c.eval_interval % c.sample_every == 0:
                self.log_sample(state)
        is_routine = is_eval and c.always_save_checkpoint
        if improved or is_last or is_routine or is_save:
            self.save(state, step, is_best=improved)

    def evaluate(self, state: TrainState, step: int, *, with_full_loss: bool) -> bool:
        """Log both losses, and return whether the validation loss is the lowest so far.

        Also log the exact loss of the whole validation split, if `with_full_loss` or if the run
        ends at this step, before `max_iters`.
        """
        row: dict[str, Any] = {"step": step} | self.evaluator.losses(state.params, step)
        improved = self.best.update(step, row["val_loss"])
        if (with_full_loss or self.best.ends_run) and self.config.eval_iters:
            row["full_val_loss"] = self.evaluator.full_loss(state.params)
        self.log.eval(row | {"time": time.time()})
        if improved and self.best.reached_target:
            self.log_target(step)
        return improved

    def log_target(self, step: int) -> None:
        """Log the steps, tokens and seconds that the run took to reach its target."""
        row = {"step": step, "target_val_loss": self.config.target_val_loss}
        row |= {"tokens": step * tokens_per_step(self.config)}
        row |= {"train_s": self.stopwatch.train_s, "total_s": self.stopwatch.total_s}
        self.log.target(row | {"time": time.time()})

    def log_sample(self, state: TrainState) -> None:
        """Log a short sample from the model. Every process must call it, to gather the weights."""
        dataset = self.run.dataset
        if dataset.tokenizer is None:
            return
        whole = self.replicate(state.params)
        self.sampler = self.sampler or Sampler(self.config)
        self.sampler.load(jax.tree.map(lambda p: p.addressable_data(0), whole))
        prompt = dataset.example or default_prompt(dataset.tokenizer)
        seed = self.config.seed
        text = generate_text(self.sampler, dataset.tokenizer, [prompt], SAMPLE_TOKENS, seed=seed)
        self.log.info("".join(new for (new,) in text))
        self.sampler.unload()

    def save(self, state: TrainState, step: int, *, is_best: bool) -> None:
        """Save a checkpoint. Raises `UserError` if the state is not finite."""
        items = {"params": state.params, "opt_state": state.opt_state}
        # An update can overflow although its gradient is finite. `recent_2W` is not checked,
        # because it holds infinities until W steps are recorded.
        if not self.all_finite(items):
            raise UserError(
                f"step {step}: a weight or moment is not finite, so the state is not saved; "
                "expected finite numbers; try a lower learning_rate, then --init_from=resume"
            )
        meta = {
            "step": step,
            "config": self.config.to_dict(),
            "best_val_loss": self.best.val_loss if math.isfinite(self.best.val_loss) else None,
            "best_step": self.best.step,
            "evaluations_since_best": self.best.evaluations_since,
            "train_s": self.stopwatch.train_s,
            "total_s": self.stopwatch.total_s,
            "skipped": asdict(self.skipped),
            "dataset": self.config.dataset,
            "data": self.run.dataset.fingerprint,
        }
        if state.recent_2W is not None:
            meta["recent_steps"] = spikes.to_json(state.recent_2W)
        self.log.sync()
        self.run.checkpoints.save(items, meta, best=is_best)

    def finish(self, state: TrainState, step: int) -> None:
        """Save the last state unless it is saved, wait for the save, and log how the run ended."""
        # a run that resumes from step 0 would start anew, without the weights of `init_from`
        if step == 0:
            held = f"{self.config.out_dir} holds no checkpoint, because no step was taken"
            self.log.info(f"{held}; try the same command again")
            return
        if self.run.checkpoints.newest != step:
            self.save(state, step, is_best=False)
        self.run.checkpoints.wait()
        if self.best.stops_early:
            self.log.info(
                f"early stop: {self.config.early_stopping_patience} evaluations since the lowest "
                f"validation loss, {self.best.val_loss:.4f} at step {self.best.step}"
            )
        at_end = step == self.config.max_iters or self.best.stops_early
        if at_end and self.config.target_val_loss and not self.best.reached_target:
            self.log.info(
                f"target_val_loss={self.config.target_val_loss}: not reached in {step} steps; the "
                f"lowest validation loss is {self.best.val_loss:.4f}, at step {self.best.step}"
            )
        self.log.info(f"{self.config.out_dir} holds the run up to step {step}")


def all_finite(tree: Any) -> jax.Array:
    """Return whether every number in a tree of arrays is finite."""
    return jnp.array([jnp.isfinite(array).all() for array in jax.tree.leaves(tree)]).all()
