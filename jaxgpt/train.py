"""The training run: data -> step -> log -> eval -> save, until the end or a signal."""

import math
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import model, sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data.batches import Batches, make_resident
from jaxgpt.data.prepare import find_dataset, prepare_if_missing
from jaxgpt.data.tokens import Dataset
from jaxgpt.evaluate import DISPATCH, full_split, mean_loss, random_batches
from jaxgpt.interop import huggingface
from jaxgpt.optimizer import frozen
from jaxgpt.runtime import device, distributed, run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.runtime.metrics import Log, NullLog, Row, Stopwatch
from jaxgpt.sample import Sampler, sample_text
from jaxgpt.train_step import abstract_state, init_state, make_eval_step, make_train_step

TRAIN, EVAL_TRAIN, EVAL_VAL = range(3)  # streams of batches
SAMPLE_TOKENS = 200
SLOW_FLOPS = 1e10  # of a step; about a tenth of a second on two cores


def train(config: Config, on_cpu: dict[str, Any], given: frozenset[str] = frozenset()) -> int:
    """Runs `config` to its end -> 0, or 128 + n if signal n ended it early, with its state saved.

    `on_cpu` are the keys that differ for want of an accelerator, `given` those that the command
    line set. Raises `UserError`.
    """
    with distributed.abort_all_on_error(), run_dir.lock_run_dir(config.out_dir):
        distributed.on_process_0(partial(prepare_if_missing, config))
        checkpoints = run_dir.open_checkpoints(config)
        if config.init_from in ("resume", "auto"):
            checkpoints.quarantine_corrupt()
        weights, config, adopted = huggingface.resolve_init(config, checkpoints, given)
        dataset = find_dataset(config, config.block_size)
        config = config.replace(
            vocab_size=_vocab_size(config, dataset), eot_id=_eot_id(config, dataset)
        )
        if isinstance(weights, run_dir.RunWeights):
            weights.check_tokenizer(dataset)
        if config.freeze:
            frozen(config, model.split(config)[1])  # or it raises, while nothing is written
        first_step = distributed.on_process_0(lambda: run_dir.resume_step(config, checkpoints))
        mesh = sharding.make_mesh(config)
        resolved, notes = device.resolve_auto(config)
        distributed.on_process_0(lambda: run_dir.create(config, dataset, fresh=first_step == 0))
        log = Log(config, first_step) if distributed.is_process_0() else NullLog()
        with log, distributed.StopSignal() as stop:
            trainer = Trainer(resolved, mesh, dataset, checkpoints, log, stop)
            trainer.introduce(on_cpu, adopted + notes)
            trainer.start(first_step, weights)
            trainer.run()
    return 128 + trainer.stopped_by if trainer.stopped_by else 0


def _vocab_size(config: Config, dataset: Dataset) -> int:
    if 0 < config.vocab_size < dataset.vocab_size:
        raise UserError(
            f"vocab_size={config.vocab_size}: must be at least the dataset's {dataset.vocab_size}"
        )
    return config.vocab_size or dataset.vocab_size


def _eot_id(config: Config, dataset: Dataset) -> int:
    """Where documents begin, if the model is to know."""
    if not config.document_mask or config.eot_id >= 0:
        return config.eot_id
    eot = dataset.tokenizer.eot if dataset.tokenizer else None
    if eot is None:
        raise UserError(
            f"document_mask=True: the tokenizer of {config.dataset!r} has no end-of-text, or is "
            "not known; --eot_id says which id begins a document"
        )
    return eot


def _all_finite(state: dict[str, Any]) -> jax.Array:
    return jnp.array([jnp.isfinite(array).all() for array in jax.tree.leaves(state)]).all()


class Trainer:
    """One run: its state on the mesh, its batches, and what happens at each step."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        dataset: Dataset,
        checkpoints: Checkpoints,
        log: Log | NullLog,
        stop: distributed.StopSignal,
    ):
        self.config, self.mesh, self.dataset = config, mesh, dataset
        self.checkpoints, self.log, self.stop = checkpoints, log, stop
        self.sequences = sharding.global_batch_size(config)
        self.micro_batches = sharding.num_microbatches(config, mesh)
        tokens = len(dataset.train) + len(dataset.val)
        self.on_device = device.fits_on_device(
            config, tokens, tokens * dataset.train.dtype.itemsize
        )
        self.steps = self._steps_per_dispatch()
        self.batches = self._make_batches()
        self.eval_step = make_eval_step(config, mesh)
        self.best_val_loss, self.best_step, self.step = math.inf, 0, 0
        self.skipped_in_row, self.skipped = 0, 0
        self.agreed_signal = 0
        self.stopwatch, self.sampler = Stopwatch(), None
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._replicate = jax.jit(lambda tree: tree, out_shardings=everywhere)
        self._max = jax.jit(jnp.max, out_shardings=everywhere)
        self._all_finite = jax.jit(_all_finite, out_shardings=everywhere)
        peak = device.peak_flops() if config.dtype == "bfloat16" else None
        self.peak_tokens = peak and peak * mesh.size / model.flops_per_token(config)

    def _steps_per_dispatch(self) -> int:
        """Several, but not where a CPU would take long over them: signals wait for a dispatch."""
        c = self.config
        flops = model.flops_per_token(c) * self.sequences * c.block_size
        is_slow = device.is_cpu() and flops > SLOW_FLOPS
        return c.steps_per_call or (10 if self.on_device and not is_slow else 1)

    def _make_batches(self) -> dict[int, Batches]:
        c, train, val = self.config, self.dataset.train, self.dataset.val
        resident = {
            t: make_resident(t, self.mesh) if self.on_device else None for t in (train, val)
        }
        sequences = self.sequences // self.micro_batches
        self.eval_batches, eval_sequences = sharding.eval_batches(c, self.mesh)
        eval_shape = min(DISPATCH, self.eval_batches), 1, eval_sequences
        make = partial(Batches, mesh=self.mesh, block_size=c.block_size, seed=c.seed)
        return {
            stream: make(tokens, shape_KMB=shape, stream=stream, resident=resident[tokens], ahead=n)
            for stream, tokens, shape, n in (
                (TRAIN, train, (self.steps, self.micro_batches, sequences), 2),
                (EVAL_TRAIN, train, eval_shape, 0),
                (EVAL_VAL, val, eval_shape, 0),
            )
        }

    def introduce(self, on_cpu: dict[str, Any], notes: list[str]) -> None:
        """Says what runs on what."""
        c, data, devices = self.config, self.dataset, self.mesh.size
        kind = jax.devices()[0].device_kind
        if on_cpu:
            changed = ", ".join(f"{key}={value}" for key, value in on_cpu.items())
            self.log.info(f"no accelerator, so the config's on_cpu holds: {changed}")
        self.log.info(f"device: {devices} x {kind}, {c.dtype}, {c.attention} attention")
        train = "endless" if len(data.train) == sys.maxsize else f"{len(data.train):,}"
        self.log.info(
            f"data: {data.source}; {train} train and {len(data.val):,} val tokens, "
            f"vocabulary {data.vocab_size}" + (", held on the device" if self.on_device else "")
        )
        self.log.info(
            f"model: {model.count_params(c) / 1e6:.2f}M parameters; "
            f"step: {self.sequences * c.block_size:,} tokens = {self.sequences} x {c.block_size} "
            f"in {self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        )
        if c.freeze:
            _, shapes, _ = model.split(c)
            sizes = jax.tree.map(lambda still, p: p.size * still, frozen(c, shapes), shapes)
            self.log.info(f"frozen: {sum(jax.tree.leaves(sizes)) / 1e6:.2f}M parameters")
        for note in notes:
            self.log.info(note)

    def start(
        self, first_step: int, weights: huggingface.Weights | run_dir.RunWeights | None
    ) -> None:
        """The state to begin with: fresh, with these weights if any, or that step's checkpoint."""
        self.step = first_step
        if not first_step:
            self.state = init_state(self.config, self.mesh)
            if weights:
                self.state["params"] = weights.load(self.config, self.mesh)
            return
        meta = self.checkpoints.meta(first_step)
        if meta["dataset"] == self.config.dataset and meta["data"] != self.dataset.fingerprint:
            raise UserError(f"dataset={self.config.dataset!r}: has changed since the checkpoint")
        best = self.checkpoints.best()  # it may be damaged, and then there is none to beat
        known = best or meta.get("best_step") == 0  # 0: nothing has beaten the initial weights
        best_meta = self.checkpoints.meta(best) if best else meta
        if known and best_meta["best_val_loss"] is not None:
            self.best_val_loss, self.best_step = best_meta["best_val_loss"], best or 0
        else:
            self.best_step = first_step
        abstract = abstract_state(self.config, self.mesh)
        del abstract["step"]
        self.state = self.checkpoints.restore(abstract, first_step)
        self.state["step"] = self._scalar(first_step)
        self.log.info(f"going on from step {first_step}")

    def run(self) -> None:
        """Steps until `max_iters` or a signal.

        The host reads the numbers of a dispatch while the device works on the next: it never
        waits for the one just launched.
        """
        c = self.config
        if self.step == 0 or c.eval_only:
            self.evaluate(whole=c.eval_only)
        if c.eval_only or self.step >= c.max_iters:
            return
        distributed.on_process_0(partial(self.checkpoints.check_disk_space, self.state))
        train_step, pending = self._compile(), None
        self.stopwatch.resume()
        while self.step < c.max_iters and not self.stopped_by and not self.stopped_early:
            count = min(self.steps, self._until_pause())
            batch = self.batches[TRAIN].get(self.step)
            self.state, metrics = train_step(self.state, batch, self._scalar(count))
            if jax.process_count() > 1:
                metrics["signal"] = self._poll_signals()
            self._report(pending)
            pending, self.step = (self.step, count, metrics), self.step + count
            if self._due(c.eval_interval) or self._due(c.save_interval) or self.step == c.max_iters:
                pending = self._report(pending)
                self._pause()
        self._report(pending)
        if self.checkpoints.newest != self.step:
            self._save(best=False)
        self.checkpoints.wait()
        if self.stopped_early:
            self.log.info(
                f"early stop: {c.early_stopping_patience} evaluations since the lowest validation loss, "
                f"{self.best_val_loss:.4f} at step {self.best_step}"
            )
        self.log.info(f"{c.out_dir} holds the run up to step {self.step}")

    def _compile(self):
        began = time.perf_counter()
        step = make_train_step(self.config, self.mesh)
        batch = self.batches[TRAIN].get(self.step)
        compiled = step.lower(self.state, batch, self._scalar(1)).compile()
        self.log.info(f"compiled in {time.perf_counter() - began:.1f} s")
        return compiled

    def _scalar(self, value: int) -> jax.Array:
        place = NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_callback((), place, lambda _: np.array(value, np.int32))

    @property
    def stopped_by(self) -> int:
        """The signal that ends the run, or 0. Of several processes all stop at the same step."""
        return self.agreed_signal if jax.process_count() > 1 else self.stop.signal

    @property
    def stopped_early(self) -> bool:
        """Whether `early_stopping_patience` evaluations in a row were no better than the best one."""
        waits = self.config.early_stopping_patience * self.config.eval_interval
        return 0 < waits <= self.step - self.best_step

    def _poll_signals(self) -> jax.Array:
        """The highest signal that a process was sent; all read it a dispatch later."""
        place = NamedSharding(self.mesh, PartitionSpec(sharding.AXES))
        here = np.full(1, self.stop.signal, np.int32)
        return self._max(jax.make_array_from_callback((self.mesh.size,), place, lambda _: here))

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    def _until_pause(self) -> int:
        """Steps until the loop has something else to do."""
        intervals = [n for n in (self.config.eval_interval, self.config.save_interval) if n]
        return min(self.config.max_iters - self.step, *(n - self.step % n for n in intervals))

    def _report(self, dispatch: tuple[int, int, dict] | None) -> None:
        """Logs the steps of a dispatch, once the device is through with it."""
        if dispatch is None:
            return
        before, count, metrics = dispatch
        metrics = jax.device_get(metrics)
        self.agreed_signal = int(metrics.pop("signal", 0))
        self.stopwatch.lap(count)
        for i, step in enumerate(range(before + 1, before + count + 1)):
            self._check_finite(step, float(metrics["loss"][i]), float(metrics["grad_norm"][i]))
            if step % self.config.log_interval == 0 or step == 1:
                self._log_step(step, {key: float(values[i]) for key, values in metrics.items()})

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        """Raises `UserError` for a step that the device has refused, unless it may be skipped."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_row = 0
            return
        self.skipped_in_row += 1
        self.skipped += 1
        what = f"step {step}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
        if self.skipped_in_row > self.config.max_nonfinite_steps:
            raise UserError(
                f"{what}, so it was not taken; try a lower learning_rate, more warmup_iters, a "
                "grad_clip, or max_nonfinite_steps=10 if single batches are to blame"
            )
        self.log.info(f"{what}: skipped")

    def _log_step(self, step: int, numbers: Row) -> None:
        seconds = self.stopwatch.read()
        tokens = self.sequences * self.config.block_size
        row = {"step": step} | numbers
        row |= {"tokens": step * tokens, "tokens_per_s": tokens / seconds}
        row |= {"step_ms": 1000 * seconds, "time": time.time()}
        if self.config.max_nonfinite_steps:
            row["skipped"], self.skipped = self.skipped, 0
        row["mfu"] = row["tokens_per_s"] / self.peak_tokens if self.peak_tokens else None
        self.log.train(row, seconds * (self.config.max_iters - step))

    def _pause(self) -> None:
        """What is due between two steps: an evaluation, a sample, a checkpoint."""
        c, improved = self.config, False
        is_last, evaluates = self.step == c.max_iters, self._due(c.eval_interval)
        if evaluates or is_last:
            improved = self.evaluate(whole=is_last)
            if c.sample_every and self.step // c.eval_interval % c.sample_every == 0:
                self._sample()
        if (
            improved
            or is_last
            or (evaluates and c.always_save_checkpoint)
            or self._due(c.save_interval)
        ):
            self._save(best=improved)
        self.stopwatch.resume()

    def evaluate(self, *, whole: bool) -> bool:
        """Logs the losses at this step -> whether the validation loss is the best so far.

        They are estimates from `eval_iters` random batches, as in nanoGPT; `whole` adds the loss
        of the whole validation split, which is all there is when `eval_iters` is 0.
        """
        row: Row = {"step": self.step}
        for name, stream in ("train", EVAL_TRAIN), ("val", EVAL_VAL):
            row[f"{name}_loss"] = self._loss(stream, whole=not self.config.eval_iters)
        if improved := row["val_loss"] < self.best_val_loss:
            self.best_val_loss, self.best_step = row["val_loss"], self.step
        if (whole or self.stopped_early) and self.config.eval_iters:
            row["full_val_loss"] = self._loss(EVAL_VAL, whole=True)
        self.log.eval(row | {"time": time.time()})
        return improved

    def _loss(self, stream: int, *, whole: bool) -> float:
        batches = self.batches[stream]
        if whole:
            some = full_split(batches.tokens, self.mesh, batches.shape_KMB[2], batches.block_size)
        else:
            some = random_batches(batches, self.step, self.eval_batches)
        return mean_loss(self.eval_step, self.state["params"], some)

    def _save(self, *, best: bool) -> None:
        if not self._all_finite(self.state):  # an update can overflow though its gradient does not
            raise UserError(
                f"step {self.step}: a weight or moment is not finite, so it is not saved; try a "
                "lower learning_rate"
            )
        best_val_loss = self.best_val_loss if math.isfinite(self.best_val_loss) else None
        meta = {
            "step": self.step,
            "config": self.config.to_dict(),
            "best_val_loss": best_val_loss,
            "best_step": self.best_step,
            "dataset": self.config.dataset,
            "data": self.dataset.fingerprint,
        }
        items = {name: self.state[name] for name in ("params", "opt_state")}
        self.checkpoints.save(items, meta, best=best)

    def _gather(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters whole on this process's first device; all processes take part."""
        return jax.tree.map(lambda p: p.addressable_data(0), self._replicate(params))

    def _sample(self) -> None:
        """Logs a short sample of what the model says now."""
        tokenizer = self.dataset.tokenizer
        if tokenizer is None:
            return
        self.sampler = self.sampler or Sampler(self.config)
        self.sampler.load(self._gather(self.state["params"]))
        start = self.dataset.example or tokenizer.decode([0])  # of characters: a line break
        text = sample_text(self.sampler, tokenizer, [start], SAMPLE_TOKENS, seed=self.config.seed)
        self.log.info("".join(new for (new,) in text))
