"""Resolve a config to a run that is ready for its first step: fill in keys, find mistakes."""

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import model, sharding, spikes
from jaxgpt.config import Config, UserError
from jaxgpt.data import batch_size
from jaxgpt.data.alignment import align
from jaxgpt.data.batches import Batches, make_resident
from jaxgpt.data.prepare import find_dataset, prepare_if_missing
from jaxgpt.data.tasks import TASKS
from jaxgpt.data.tokenizer import check_same
from jaxgpt.data.tokens import Dataset
from jaxgpt.evaluate import BATCHES_PER_CALL
from jaxgpt.interop import huggingface
from jaxgpt.interop.trained import resolve_initial_weights
from jaxgpt.optimizer import frozen_mask, update_kinds
from jaxgpt.runtime import device, distributed, resume, run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.runtime.files import import_extra
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.train_step import TrainState, abstract_state, init_state

TRAIN, EVAL_TRAIN, EVAL_VAL = range(3)  # streams of batches
AUTO_KEYS = ("vocab_size", "eot_id", "dtype", "attention", "steps_per_call")  # filled in for a run
# A step is slow from this many FLOPs per device on. They take a tenth of a second on two cores, or
# two milliseconds on a GPU.
SLOW_FLOPS = {"cpu": 1e10, "gpu": 5e11}
FAST_STEPS = 10  # per call
FIT_IN_MEMORY = "try a smaller --batch_size, --remat=full or a smaller model"
EXTRAS = {  # key -> the extra that it needs, and the modules
    "report": ("report", ("altair", "vl_convert")),
    "tensorboard": ("log", ("tensorboardX",)),
    "wandb_log": ("log", ("wandb",)),
}


@dataclass(frozen=True)
class ResolvedRun:
    """A run that has locked its directory and is ready for its first step."""

    config: Config  # fully resolved; config.json says the same
    mesh: Mesh
    dataset: Dataset
    checkpoints: Checkpoints
    weights: huggingface.Weights | run_dir.RunWeights | None  # initial weights, if not random
    resume_step: int  # 0 for a fresh run
    notes: list[str]  # for the log: keys taken from weights or checkpoint, and fallbacks


@contextmanager
def resolve_run(config: Config, cli_keys: frozenset[str] = frozenset()) -> Iterator[ResolvedRun]:
    """Lock the run directory, check the run, fill in its keys, and write config.json.

    `cli_keys` are the keys set on the command line. Corrupt checkpoints are quarantined, and a
    missing dataset is prepared. Then raises `UserError`, before the run directory changes, if a key
    does not fit the data, the weights, the devices or the run that is resumed.
    """
    with distributed.abort_all_on_error(), run_dir.lock_run_dir(config.out_dir):
        checkpoints = run_dir.open_checkpoints(config)
        if config.init_from in ("resume", "auto"):
            checkpoints.quarantine_corrupt()
        is_fresh = run_dir.step_to_resume(config, checkpoints) is None
        distributed.on_process_0(partial(prepare_if_missing, config, is_fresh=is_fresh))
        weights, config, notes = resolve_initial_weights(config, checkpoints, cli_keys)
        dataset = find_dataset(config, config.block_size, config.vocab_size)
        distributed.on_process_0(partial(resume.check_data, config, checkpoints, dataset))
        if weights is not None:
            check_same(config.dataset, dataset.tokenizer, weights.tokenizer_file)
        config = _fill_in_from_dataset(config, dataset)
        if config.align_documents:
            dataset = _align(config, dataset)
        check_freeze(config)
        _check_sampled(config, dataset)
        distributed.on_process_0(partial(_check_extras, config))
        if config.eval_iters == 0 and config.dataset in TASKS:
            dataset.train.read(0, 1)  # fails now, because training problems are endless
        resume_step = distributed.on_process_0(partial(run_dir.resume_step, config, checkpoints))
        mesh = make_mesh(config)
        config, device_notes = device.resolve_auto(config)
        device.save_memory(count_params(config))
        config = config.replace(steps_per_call=steps_per_call(config, dataset))
        distributed.check_same(_shared_values(config, dataset))
        create = partial(run_dir.create, config, dataset, fresh=resume_step == 0)
        distributed.on_process_0(create)
        checkpoints.newest = checkpoints.latest()  # `create` deletes those of an old run
        notes += device_notes + resume.describe_changes(config, checkpoints, resume_step)
        subject = f"batch_size={config.batch_size}"
        explained = device.explain_out_of_memory(subject, "the training step", FIT_IN_MEMORY)
        with explained, checkpoints.completing():
            yield ResolvedRun(config, mesh, dataset, checkpoints, weights, resume_step, notes)


def _shared_values(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Return what must be the same in all processes of a run: the config and the data."""
    own = "process_id", "coordinator", "data_dir"
    shared = {key: value for key, value in config.to_dict().items() if key not in own}
    has_tokenizer = dataset.tokenizer is not None
    return shared | {"token files": dataset.fingerprint, "has tokenizer": has_tokenizer}


def tokens_per_step(config: Config) -> int:
    return batch_size.global_batch_size(config) * config.block_size


def count_params(config: Config) -> int:
    """Count parameters as nanoGPT does: without position embeddings and without padding."""
    sizes = unpadded_sizes(config) | {"pos_embed": {}}
    return sum(jax.tree.leaves(sizes))


def unpadded_sizes(config: Config) -> dict:
    """Return the size of each parameter, without the padding of the vocabulary."""
    _, shapes, axes = model.abstract_model(config)
    padded = max(1, config.padded_vocab_size)  # 0 if `vocab_size` is not known yet

    def unpadded_size(shape: jax.ShapeDtypeStruct, letters: str) -> int:
        return shape.size // padded * config.vocab_size if "V" in letters else shape.size

    return jax.tree.map(unpadded_size, shapes, axes)


def flops_per_token(config: Config) -> int:
    """Return training FLOPs per token by nanoGPT's formula: 6 P + 12 L D T, P parameters.

    P does not include tables that are only looked up, such as an untied token embedding.
    """
    c = config
    tables = 0
    if not c.tie_embeddings:
        tables = sum(jax.tree.leaves(unpadded_sizes(c).get("embed", {})))
    return 6 * (count_params(c) - tables) + 12 * c.n_layer * c.n_embd * c.block_size


def peak_tokens_per_s(config: Config, mesh: Mesh) -> float | None:
    """Return the tokens per second at the devices' peak FLOP/s, or None if the peak is unknown."""
    peak = device.peak_flops() if config.dtype == "bfloat16" else None
    return peak and peak * mesh.size / flops_per_token(config)


def steps_per_call(config: Config, dataset: Dataset) -> int:
    """Return the steps per call of the compiled program: the config's, or a default by speed.

    Slow steps are called one by one. On a CPU, a signal waits for the end of a call. On a GPU, the
    host starts each iteration of a loop, which takes longer than a call that overlaps the last one
    (docs/performance.md, "A call per slow step").
    """
    if config.steps_per_call:
        return config.steps_per_call
    devices = 1 if device.is_cpu() else jax.device_count()  # a CPU's devices share its cores
    flops = flops_per_token(config) * tokens_per_step(config) / devices
    is_slow = flops > SLOW_FLOPS.get(jax.default_backend(), math.inf)
    is_fast = device.fits_on_device(config, dataset) and not is_slow
    return FAST_STEPS if is_fast else 1


def check_freeze(config: Config) -> None:
    """Raise `UserError` unless `freeze` matches some parameters and leaves some to train."""
    if not config.freeze:
        return
    try:
        re.compile(config.freeze)
    except re.error as error:
        raise UserError(
            f"freeze={config.freeze!r}: {error}; expected a regular expression"
        ) from error
    shapes = model.abstract_model(config).shapes
    unstacked = config.replace(scan_layers=False)
    if config.scan_layers and _num_updated(config, "frozen") != _num_updated(unstacked, "frozen"):
        raise UserError(
            f"freeze={config.freeze!r}: selects single layers, but with scan_layers=True one array "
            "holds all layers; expected a pattern for all layers, or scan_layers=False"
        )
    matches = jax.tree.leaves(frozen_mask(config, shapes))
    if len(set(matches)) > 1:
        return
    keys = [key for key, _ in jax.tree.leaves_with_path(shapes)]
    paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key in keys]
    kinds = dict.fromkeys(re.sub(r"/\d+/", "/0/", path) for path in paths)
    raise UserError(
        f"freeze={config.freeze!r}: matches {'all' if matches[0] else 'none'} of the parameters; "
        f"expected a pattern that matches some of {', '.join(kinds)}"
    )


def _num_updated(config: Config, kind: str) -> int:
    """Count the parameters with this kind of update (see `update_kinds`), without padded rows."""
    sizes, kinds = unpadded_sizes(config), update_kinds(config)
    of_kind = jax.tree.map(lambda size, its_kind: size * (its_kind == kind), sizes, kinds)
    return sum(jax.tree.leaves(of_kind))


def _fill_in_from_dataset(config: Config, dataset: Dataset) -> Config:
    """Fill in `vocab_size`, and `eot_id` if `document_mask` needs it."""
    vocab_size = config.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(
            f"vocab_size={vocab_size}: smaller than the dataset's vocabulary; expected at least "
            f"{dataset.vocab_size}, or 0 for the dataset's own"
        )
    eot_id = config.eot_id
    if config.document_mask:
        eot_id = _end_of_text("document_mask", config, dataset)
    if eot_id >= vocab_size:
        expected = f"expected an id below vocab_size={vocab_size}"
        raise UserError(f"eot_id={eot_id}: not in the vocabulary; {expected}")
    return config.replace(vocab_size=vocab_size, eot_id=eot_id)


def _end_of_text(key: str, config: Config, dataset: Dataset) -> int:
    """Return the end-of-text id, which `key` needs. Raises `UserError` if it is unknown."""
    of_tokenizer = dataset.tokenizer.eot if dataset.tokenizer else None
    eot_id = config.eot_id if config.eot_id >= 0 else of_tokenizer
    if eot_id is None:
        raise UserError(
            f"{key}=True: the tokenizer of dataset={config.dataset!r} has no end-of-text token, or "
            "is unknown; expected an end-of-text; try --eot_id=ID, the id between two documents"
        )
    return eot_id


def _align(config: Config, dataset: Dataset) -> Dataset:
    """Return the dataset with `aligned` windows. Raises `UserError` if there is none."""
    key = "align_documents"
    if config.dataset in TASKS:
        problem = f"dataset={config.dataset!r} has problems and no documents"
        raise UserError(f"{key}=True: {problem}; try {key}=False")
    eot_id = _end_of_text(key, config, dataset)
    aligned = align(dataset, eot_id, config.block_size)
    if len(aligned.window_starts) == 0:
        raise UserError(
            f"{key}=True: the train split of dataset={config.dataset!r} has no end-of-text (id "
            f"{eot_id}) that block_size={config.block_size} tokens follow; expected at least one; "
            "try a smaller --block_size, or another --eot_id"
        )
    return replace(dataset, aligned=aligned)


def summary(run: ResolvedRun) -> list[str]:
    """Return lines for the log: device, data, model, frozen parameters, notes, resumed step."""
    config, data = run.config, run.dataset
    train_tokens = "endless" if len(data.train) == sys.maxsize else f"{len(data.train):,}"
    place = ", held on the device" if device.fits_on_device(config, data) else ""
    sequences = batch_size.global_batch_size(config)
    num_micro_batches = batch_size.num_microbatches(config, run.mesh)
    lines = [
        f"device: {run.mesh.size} x {jax.devices()[0].device_kind}, {config.dtype}, "
        f"{config.attention} attention",
        f"data: {data.source}; {train_tokens} train and {len(data.val):,} val tokens, "
        f"vocabulary {data.vocab_size}{place}",
        f"model: {count_params(config) / 1e6:.2f}M parameters; "
        f"step: {tokens_per_step(config):,} tokens = {sequences} x {config.block_size} "
        f"in {num_micro_batches} micro-batch{'es' if num_micro_batches > 1 else ''}",
    ]
    if config.freeze:
        lines.append(f"frozen: {_num_updated(config, 'frozen') / 1e6:.2f}M parameters")
    if config.uses_muon:
        count = _num_updated(config, "muon")
        lines.append(f"{config.optimizer}: {count / 1e6:.2f}M parameters; AdamW: the others")
    if data.aligned is not None:
        count = len(data.aligned.window_starts)
        covered = count * config.block_size / len(data.train)
        lines.append(
            f"align_documents: an epoch has {count:,} windows, each at the start of a document, "
            f"with {100 * covered:.1f}% of the train tokens"
        )
    resumed = [f"resuming from step {run.resume_step}"] if run.resume_step else []
    return [*lines, *data.notes, *run.notes, *resumed]


# ---- data and state ------------------------------------------------------------------------


def make_batches(config: Config, mesh: Mesh, dataset: Dataset) -> dict[int, Batches]:
    """Return the batches of each stream: training, and evaluation on either split."""
    num_micro_batches = batch_size.num_microbatches(config, mesh)
    micro_batch_size = batch_size.global_batch_size(config) // num_micro_batches
    train_shape = steps_per_call(config, dataset), num_micro_batches, micro_batch_size
    num_eval_batches, eval_batch_size = batch_size.eval_batches_and_size(config, mesh)
    eval_shape = min(BATCHES_PER_CALL, num_eval_batches), 1, eval_batch_size
    make = partial(Batches, mesh=mesh, block_size=config.block_size, seed=config.seed)
    train, val = dataset.train, dataset.val
    fits = device.fits_on_device(config, dataset)
    train_tokens, val_tokens = (make_resident(t, mesh) if fits else None for t in (train, val))
    windows = train if dataset.aligned is None else dataset.aligned
    return {
        TRAIN: make(windows, shape_UMB=train_shape, stream=TRAIN, resident=train_tokens, ahead=2),
        EVAL_TRAIN: make(train, shape_UMB=eval_shape, stream=EVAL_TRAIN, resident=train_tokens),
        EVAL_VAL: make(val, shape_UMB=eval_shape, stream=EVAL_VAL, resident=val_tokens),
    }


def _check_sampled(config: Config, dataset: Dataset) -> None:
    """Raise `UserError` if the run would sample, or report, a model that it cannot sample."""
    for key in "sample_every", "report":
        if getattr(config, key) and not config.causal:
            off = f"{key}={getattr(Config, key)}"
            problem = f"an encoder cannot be sampled; expected causal=True, or {off}"
            raise UserError(f"{key}={getattr(config, key)}: {problem}")
    if config.report and config.eval_only:
        raise UserError("report=True: eval_only=True trains no model; expected report=False")
    if config.report and dataset.tokenizer is None:
        problem = f"the tokenizer of dataset={config.dataset!r} is unknown"
        raise UserError(f"report=True: {problem}; expected report=False")
    if config.report and jax.process_count() > 1:
        advice = f"expected report=False; try jaxgpt report {config.out_dir} after the run"
        raise UserError(f"report=True: a run of several processes cannot write it; {advice}")


def _check_extras(config: Config) -> None:
    """Raise `UserError` if a package is missing that process 0 needs later in the run."""
    for key, (extra, modules) in EXTRAS.items():
        if getattr(config, key):
            for module in modules:
                import_extra(module, f"{key}=True", extra)


@dataclass
class Best:
    """The lowest validation loss so far, its step, and whether it ends the run."""

    config: Config
    step: int = 0
    val_loss: float = math.inf
    evaluations_since: int = 0  # without a lower loss

    def update(self, step: int, val_loss: float) -> bool:
        """Record a loss, and return whether it is the lowest so far."""
        if not val_loss < self.val_loss:  # also if it is nan
            self.evaluations_since += 1
            return False
        self.step, self.val_loss, self.evaluations_since = step, val_loss, 0
        return True

    @property
    def stops_early(self) -> bool:
        """Whether the run stops, because its loss no longer improves."""
        return 0 < self.config.early_stopping_patience <= self.evaluations_since

    @property
    def ends_run(self) -> bool:
        """Whether the run ends now, before `max_iters`."""
        return self.reached_target or self.stops_early

    @property
    def reached_target(self) -> bool:
        """Whether the lowest loss is at most `target_val_loss`; False without a target."""
        return self.config.target_val_loss > 0 and self.val_loss <= self.config.target_val_loss


def init_or_restore(run: ResolvedRun) -> tuple[TrainState, Best]:
    """Return the first state: random, from the initial weights, or restored from a checkpoint."""
    config, mesh, checkpoints, step = run.config, run.mesh, run.checkpoints, run.resume_step
    best = Best(config, step)
    if step == 0:
        state = init_state(config, mesh)
        if run.weights:
            state.params = run.weights.load(config, mesh)
        return state, best
    meta = checkpoints.meta(step)
    best_step = checkpoints.best()  # None also if the best checkpoint is corrupt
    if best_step is None and meta.get("best_step") == 0:
        best_step = 0  # no step was better than the initial weights
    best_meta = checkpoints.meta(best_step) if best_step else meta
    best_val_loss = best_meta["best_val_loss"]
    is_same_data = best_meta["dataset"] == config.dataset  # else losses are not comparable
    if best_step is not None and best_val_loss is not None and is_same_data:
        interval = meta["config"]["eval_interval"]
        by_interval = step // interval - best_step // interval  # for checkpoints without the count
        since = meta.get("evaluations_since_best", by_interval)
        best = Best(config, best_step, best_val_loss, since)
    abstract, whole = abstract_state(config, mesh), sharding.replicated(mesh)
    items = {"params": abstract.params, "opt_state": abstract.opt_state}
    state = TrainState(
        **checkpoints.restore(items, step), step=jax.device_put(np.int32(step), whole)
    )
    if config.skip_loss_spikes:
        recent_2W = spikes.from_json(meta.get("recent_steps", [[], []]), config.spike_window)
        state.recent_2W = jax.device_put(recent_2W, whole)
    return state, best
