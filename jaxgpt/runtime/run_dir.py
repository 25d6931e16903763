"""Manage the run directory: lock it, start or resume a run in it, and load the run again."""

import fcntl
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.config import Config, UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokens import Dataset
from jaxgpt.runtime import distributed, storage
from jaxgpt.runtime.checkpoint import FREE_SPACE, Checkpoints, warn
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.runtime.files import (
    FULL_DISK,
    atomic_write,
    delete,
    folder_error,
    is_url,
    make_folder,
    reason,
)
from jaxgpt.runtime.storage import CONFIG, LOCK, RUN_FILES, STEPS
from jaxgpt.train_step import abstract_params

OLD_STEPS = f"{STEPS}.deleted"  # of a run that is overwritten, until they are deleted
NO_CHECKPOINT = "no checkpoint in it yet; expected a run that has saved one"


@contextmanager
def lock_run_dir(out_dir: str) -> Iterator[None]:
    """Keep other processes from writing to a run directory; a dead process loses the lock.

    Raises `UserError`, also if the disk is full.
    """
    file = distributed.on_process_0(partial(_lock, out_dir))
    try:
        with storage.open_to_write(out_dir):
            yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        problem = f"{str(error.strerror).lower()}, but saved checkpoints are complete"
        raise UserError(f"out_dir={out_dir!r}: {problem}; {FREE_SPACE}") from error
    finally:
        if distributed.is_process_0():
            os.close(file)


def _lock(out_dir: str) -> int:
    """Return the open lock file. The file is never deleted, because that would be a race."""
    subject, folder = f"out_dir={out_dir!r}", storage.mirror_folder(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise folder_error(subject, "out_dir", error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 20).decode("ascii", "replace").strip()
        os.close(file)
        raise UserError(
            f"{subject}: process {holder} is writing to this run; expected a directory that no "
            "other process uses; try another out_dir, or stop that process"
        ) from None
    except OSError as error:  # some network file systems have no locks
        problem = f"cannot be locked ({str(error.strerror).lower()})"
        warn(f"{subject}: {problem}; expected no other process that writes to this run")
    with suppress(OSError):  # of a full disk: what counts is the lock, and not who holds it
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode("ascii"))
    return file


def open_checkpoints(config: Config) -> Checkpoints:
    return storage.checkpoints(config.out_dir, config.keep_checkpoints)


def resume_step(config: Config, checkpoints: Checkpoints) -> int:
    """Return the step to resume from; 0 is a fresh run.

    Raises `UserError` if `init_from` does not fit what the directory holds.
    """
    latest, damaged, out_dir = checkpoints.latest(), checkpoints.damaged(), config.out_dir
    if latest is None:
        if damaged and not config.overwrite:
            fresh = "--init_from=auto " if config.init_from == "resume" else ""
            raise UserError(
                f"out_dir={out_dir!r}: all of its checkpoints are damaged, such as "
                f"{damaged[-1].name}; try {fresh}--overwrite to delete them and start again"
            )
        if config.init_from == "resume":
            raise UserError(f"init_from='resume': no checkpoint in {out_dir}; try --init_from=auto")
        return 0
    if config.init_from not in ("resume", "auto"):
        if not config.overwrite:
            raise UserError(
                f"out_dir={out_dir!r}: holds a run of {latest} steps; "
                "try --init_from=resume to continue it, or --overwrite to delete it"
            )
        return 0
    saved = saved_config(config, checkpoints, latest)
    keys = [*_model_values(saved), "scan_layers", "optimizer", "freeze"]
    if saved.optimizer == "normuon":  # its second moment has a number per head
        keys.append("muon_per_head")
    for key in keys:
        _check_same(config, key, getattr(saved, key), f"the run in {out_dir}")
    return latest


def _check_same(config: Config, key: str, expected: Any, whose: str) -> None:
    """Raise `UserError` if a key differs from that of an existing model."""
    value = getattr(config, key)
    if value != expected:
        advice = f"expected {expected!r}; try --{key}={shlex.quote(str(expected))}"
        raise UserError(f"{key}={value!r}: differs from {whose}; {advice}")


def saved_model(config: Config, checkpoints: Checkpoints) -> dict[str, Any]:
    """Return the model's keys of the run to resume, or an empty dict for a fresh run."""
    step = step_to_resume(config, checkpoints)
    return {} if step is None else _model_values(saved_config(config, checkpoints, step))


def step_to_resume(config: Config, checkpoints: Checkpoints) -> int | None:
    """Return the step from which `init_from` continues, or None for a fresh run."""
    return checkpoints.latest() if config.init_from in ("resume", "auto") else None


def saved_config(config: Config, checkpoints: Checkpoints, step: int) -> Config:
    """Return the config of a checkpoint. Raises `UserError` for a run of another class."""
    meta, config_class = checkpoints.meta(step), type(config)
    try:
        return config_class.from_dict(meta["config"])
    except (UserError, TypeError) as error:
        problem = f"its run is not of class {config_class.__name__} ({error})"
        raise UserError(f"out_dir={config.out_dir!r}: {problem}; try another out_dir") from error


def _model_values(config: Config) -> dict[str, Any]:
    """Return the model's keys that cannot change between runs: all but dropout."""
    return {key: getattr(config, key) for key in config.model_keys() if key != "dropout"}


def merge_model_keys(
    config: Config, theirs: dict[str, Any], whose: str, cli_keys: frozenset[str]
) -> Config:
    """Return `config` with the model's keys of an existing model.

    Raises `UserError` for a different key that is set on the command line or not a default.
    """
    defaults = {field.name: field.default for field in fields(config)}
    for key, expected in theirs.items():
        if key in cli_keys or getattr(config, key) != defaults[key]:
            _check_same(config, key, expected, whose)
    return config.replace(**theirs)


def create(config: Config, dataset: Dataset, *, fresh: bool) -> None:
    """Write a run's config and tokenizer; if it is `fresh`, delete an old run's files first.

    Raises `UserError` for files that only look like a run's.
    """
    folder, subject = storage.local(config.out_dir), f"out_dir={config.out_dir!r}"
    existing = [folder / name for name in (*RUN_FILES, STEPS) if (folder / name).exists()]
    if fresh and existing and not is_run(folder):
        problem = f"holds {existing[0].name}, but no run"
        raise UserError(f"{subject}: {problem}; expected an empty folder; try another out_dir")
    make_folder(folder, subject, "out_dir")
    if fresh:
        delete(folder / OLD_STEPS)
        if (folder / STEPS).exists():  # before the config, with which no run may resume them
            (folder / STEPS).replace(folder / OLD_STEPS)
    # The config is written first: if the process is killed later, the folder still counts as a run.
    made_by = {"config_file": config.config_file, "config_class": type(config).__name__}
    atomic_write(folder / CONFIG, json.dumps(made_by | config.to_dict(), indent=1))
    if fresh:
        for name in (OLD_STEPS, *RUN_FILES):
            if name != CONFIG:
                delete(folder / name)
    if dataset.tokenizer:
        atomic_write(folder / tokenizers.FILE, dataset.tokenizer.to_json())
    storage.publish(config.out_dir)


def is_run(out_dir: str | Path) -> bool:
    """Tell whether a folder or a URL holds the config of a run."""
    file = storage.local(str(out_dir)) / CONFIG
    try:
        return "max_iters" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def load_config(out_dir: str, config: type[Config] | str = "") -> Config:
    """Load the config of the run in `out_dir`.

    `config` is the class of the run's config, or a config file that defines it; empty means
    `Config`. Raises `UserError`, also for a run of another class.
    """
    config_class = config if isinstance(config, type) else Config
    if config and isinstance(config, str):
        config_class = type(load_config_file(config)["config"])
    if is_url(out_dir):
        storage.open_to_read(out_dir)
    subject, file = f"out_dir={out_dir!r}", storage.local(out_dir) / CONFIG
    if not file.is_file():
        raise UserError(f"{subject}: no run in it; expected a folder with {CONFIG}")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        # Old runs have no such entry and may be of any class.
        class_name = saved.get("config_class", config_class.__name__)
        if class_name == config_class.__name__:
            return config_class.from_dict(saved).replace(out_dir=out_dir)
    except (ValueError, TypeError, AttributeError) as error:
        problem = f"not the config of a run ({reason(error)})"
        raise UserError(f"{file}: {problem}; expected the file as training wrote it") from error
    if class_name == "Config":
        advice = f"expected {config_class.__name__}; try without --config"
    else:
        advice = f"try --config {saved.get('config_file') or 'FILE'}, which defines this class"
    raise UserError(f"{subject}: its config class is {class_name}; {advice}")


def load_params(config: Config, checkpoint: str, mesh: Mesh) -> tuple[dict[str, Any], int]:
    """Load the parameters of a run onto the mesh; return the parameters and their step.

    `checkpoint` is best (the newest if there is no best), latest, or a step. If the best or the
    latest is damaged, the newest intact one is loaded. Raises `UserError`.
    """
    checkpoints = open_checkpoints(config)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"out_dir={config.out_dir!r}: {NO_CHECKPOINT}")
    named = {"best": checkpoints.best() or steps[-1], "latest": steps[-1]}
    step = named[checkpoint] if checkpoint in named else int(checkpoint)
    if step not in steps:
        expected = ", ".join(["best", "latest", *map(str, steps)])
        raise UserError(f"checkpoint={checkpoint!r}: no such step; expected one of {expected}")
    others = [other for other in reversed(steps) if other != step] if checkpoint in named else []
    step = checkpoints.first_intact([step, *others])
    try:
        items = checkpoints.restore({"params": abstract_params(config, mesh)}, step)
    except Exception as error:  # Orbax raises many types
        if step in checkpoints.steps():
            raise
        problem = f"step {step} was deleted while it was read, because the run saved newer steps"
        raise UserError(f"checkpoint={checkpoint!r}: {problem}; try again") from error
    return items["params"], step


@dataclass(frozen=True)
class RunWeights:
    """The best weights of a run, from which another run starts."""

    config: Config

    @property
    def keys(self) -> dict[str, Any]:
        """The model's keys, and how its blocks are stored."""
        return _model_values(self.config) | {"scan_layers": self.config.scan_layers}

    def load(self, config: Config, mesh: Mesh) -> dict[str, Any]:
        """Load the parameters onto the mesh, without positions past `config.block_size`."""
        params, _ = load_params(self.config, "best", mesh)
        shapes = abstract_params(config, mesh)

        def cut_one(shape: jax.ShapeDtypeStruct, param: jax.Array) -> jax.Array:
            return param[tuple(slice(size) for size in shape.shape)]

        cut = partial(jax.tree.map, cut_one, shapes)
        return jax.jit(cut, out_shardings=jax.tree.map(lambda p: p.sharding, shapes))(params)

    @property
    def tokenizer_file(self) -> Path:
        return storage.local(self.config.out_dir) / tokenizers.FILE


def open_weights(config: Config) -> RunWeights:
    """Open the run that `config.init_from` names. Raises `UserError` if the run is `out_dir`."""
    init_from = config.init_from
    if Path(init_from).resolve() == Path(config.out_dir).resolve():
        raise UserError(
            f"init_from={init_from!r}: is out_dir too; try --init_from=resume to continue the run, "
            "or another --out_dir to start a new run with its weights"
        )
    source = load_config(init_from, type(config))
    if open_checkpoints(source).latest() is None:
        raise UserError(f"init_from={init_from!r}: {NO_CHECKPOINT}")
    return RunWeights(source)
