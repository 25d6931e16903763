"""The run directory: its files, the lock that one writer holds, and how a run is read again."""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.config import Config, UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokens import Dataset
from jaxgpt.runtime import distributed
from jaxgpt.runtime.checkpoint import Checkpoints, CorruptCheckpoint
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.runtime.files import atomic_write
from jaxgpt.train_step import abstract_params

CONFIG, LOCK = "config.json", ".lock"
RUN_FILES = (CONFIG, "metrics.jsonl", "loss.png", "log.txt", "tensorboard", "tokenizer.json")


@contextmanager
def lock_run_dir(out_dir: str) -> Iterator[None]:
    """Keep other runs from writing to a run directory; the lock ends with the process.

    Raises `UserError`, also where the disk is full.
    """
    file = distributed.on_process_0(partial(_lock, out_dir))
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"out_dir={out_dir!r}: {error.strerror}; what is saved is whole") from error
    finally:
        if distributed.is_process_0():
            os.close(file)


def _lock(out_dir: str) -> int:
    """Return the open lock file. It is never deleted, to avoid a race."""
    _check_is_folder(out_dir)
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        file = os.open(Path(out_dir, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"out_dir={out_dir!r}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 20).decode("ascii", "replace").strip()
        os.close(file)
        raise UserError(f"out_dir={out_dir!r}: process {holder} is writing to it") from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: {out_dir} cannot be locked ({error.strerror})", file=sys.stderr)
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode("ascii"))
    return file


def _check_is_folder(out_dir: str) -> None:
    if Path(out_dir).exists() and not Path(out_dir).is_dir():
        raise UserError(f"out_dir={out_dir!r}: is a file, not a folder")


def open_checkpoints(config: Config) -> Checkpoints:
    return Checkpoints(Path(config.out_dir, "checkpoints"), config.keep_checkpoints)


def resume_step(config: Config, checkpoints: Checkpoints) -> int:
    """Return the step to resume from; 0 is a fresh run.

    Raises `UserError` if `init_from` does not fit what the directory holds.
    """
    latest, damaged, out_dir = checkpoints.latest(), checkpoints.damaged(), config.out_dir
    _check_is_folder(out_dir)
    if latest is None:
        if damaged and not config.overwrite:
            raise UserError(
                f"out_dir={out_dir!r}: all of its checkpoints are damaged, as {damaged[-1].name} "
                "is; --overwrite deletes them and starts anew"
            )
        if config.init_from == "resume":
            raise UserError(f"init_from='resume': there is no checkpoint in {out_dir}")
        return 0
    if config.init_from not in ("resume", "auto"):
        if not config.overwrite:
            raise UserError(
                f"out_dir={out_dir!r}: holds a run of {latest} steps; --init_from=resume goes on "
                "with it, --overwrite deletes it"
            )
        return 0
    saved = _saved_config(config, checkpoints, latest)
    for key in (*_model_values(saved), "scan_layers", "optimizer", "freeze"):
        ours, theirs = getattr(config, key), getattr(saved, key)
        if ours != theirs:
            raise UserError(f"{key}={ours!r}: the run in {out_dir} has {theirs!r}")
    return latest


def saved_model(config: Config, checkpoints: Checkpoints) -> dict[str, Any]:
    """Return the model's keys of the run to resume; none if a fresh run starts."""
    latest = checkpoints.latest()
    if latest is None or config.init_from not in ("resume", "auto"):
        return {}
    return _model_values(_saved_config(config, checkpoints, latest))


def _saved_config(config: Config, checkpoints: Checkpoints, step: int) -> Config:
    meta, config_class = checkpoints.meta(step), type(config)
    try:
        return config_class.from_dict(meta["config"])
    except (UserError, TypeError) as error:
        what = f"its run is not of class {config_class.__name__} ({error})"
        raise UserError(f"out_dir={config.out_dir!r}: {what}") from error


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
    for key, value in theirs.items():
        ours = getattr(config, key)
        if ours != value and (key in cli_keys or ours != defaults[key]):
            raise UserError(f"{key}={ours!r}: {whose} has {value!r}")
    return config.replace(**theirs)


def create(config: Config, dataset: Dataset, *, fresh: bool) -> None:
    """Write a run's config and tokenizer; if it is `fresh`, delete an old run's files first.

    Raises `UserError` for files that only look like a run's.
    """
    folder = Path(config.out_dir)
    existing = [folder / name for name in (*RUN_FILES, "checkpoints") if (folder / name).exists()]
    if fresh and existing and not is_run(folder):
        raise UserError(f"out_dir={config.out_dir!r}: {existing[0].name} in it is not of a run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={config.out_dir!r}: {error.strerror}") from error
    # The config comes first: if the process is killed later, the folder is still a run's.
    made_by = {"config_file": config.config_file, "config_class": type(config).__name__}
    atomic_write(folder / CONFIG, json.dumps(made_by | config.to_dict(), indent=1))
    for path in existing:
        if not fresh or path.name == CONFIG:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if dataset.tokenizer:
        atomic_write(folder / tokenizers.FILE, dataset.tokenizer.to_json())


def is_run(folder: Path) -> bool:
    try:
        return "max_iters" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def load_config(out_dir: str, config_file: str = "", config_class: type[Config] = Config) -> Config:
    """Load the config of the run in `out_dir`, as this class or the one of a config file.

    Raises `UserError`, also for a run of another class.
    """
    if config_file:
        config_class = type(load_config_file(config_file)["config"])
    file = Path(out_dir, CONFIG)
    if not file.is_file():
        raise UserError(f"out_dir={out_dir!r}: there is no run in it ({CONFIG} is missing)")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        # runs of before this entry existed may be of any class
        class_name = saved.get("config_class", config_class.__name__)
        if class_name == config_class.__name__:
            return config_class.from_dict(saved).replace(out_dir=out_dir)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the config of a run ({error})") from error
    message = f"out_dir={out_dir!r}: its config class {class_name} is "
    if class_name == "Config":
        raise UserError(message + f"not {config_class.__name__}; leave --config out")
    defined_in = saved.get("config_file") or "FILE"
    raise UserError(message + f"defined in {defined_in}; add --config {defined_in}")


def load_params(config: Config, checkpoint: str, mesh: Mesh) -> tuple[dict[str, Any], int]:
    """Load a run's parameters onto the mesh; return them and their step.

    `checkpoint` is best (the newest if there is no best), latest, or a step. If the best or the
    latest is damaged, the newest intact one is loaded. Raises `UserError`.
    """
    checkpoints = open_checkpoints(config)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"out_dir={config.out_dir!r}: there is no checkpoint in it yet")
    named = {"best": checkpoints.best() or steps[-1], "latest": steps[-1]}
    step = named[checkpoint] if checkpoint in named else int(checkpoint)
    if step not in steps:
        names = ", ".join(map(str, steps))
        raise UserError(f"checkpoint={checkpoint!r}: {config.out_dir} has best, latest, {names}")
    abstract = {"params": abstract_params(config, mesh)}
    others = [other for other in steps if other != step] if checkpoint in named else []
    while True:
        try:
            return checkpoints.restore(abstract, step)["params"], step
        except CorruptCheckpoint as error:  # not quarantined: readers leave the directory alone
            if not others:
                raise
            step = others.pop()
            print(f"warning: {error}; taking step {step} instead", file=sys.stderr)


@dataclass(frozen=True)
class RunWeights:
    """The best weights of a run, to start another run from."""

    config: Config

    @property
    def keys(self) -> dict[str, Any]:
        """The model's keys, and how its blocks are stored."""
        return _model_values(self.config) | {"scan_layers": self.config.scan_layers}

    def load(self, config: Config, mesh: Mesh) -> dict[str, Any]:
        """Load the parameters onto the mesh, without positions past `config.block_size`."""
        params, _ = load_params(self.config, "best", mesh)
        shapes = abstract_params(config, mesh)
        cut = partial(jax.tree.map, lambda shape, p: p[: shape.shape[0]], shapes)
        return jax.jit(cut, out_shardings=jax.tree.map(lambda p: p.sharding, shapes))(params)

    def check_tokenizer(self, dataset: Dataset) -> None:
        """Raise `UserError` if a dataset's tokenizer is not the one that the run was trained on."""
        file, ours = Path(self.config.out_dir, tokenizers.FILE), dataset.tokenizer
        if ours and file.is_file() and tokenizers.load(file).to_json() != ours.to_json():
            raise UserError(
                f"init_from={self.config.out_dir!r}: the dataset has another tokenizer; prepare "
                f"it with --tokenizer={file}"
            )


def open_weights(config: Config) -> RunWeights:
    """Open the run that `config.init_from` names. Raises `UserError` if it is `out_dir`."""
    init_from = config.init_from
    if Path(init_from).resolve() == Path(config.out_dir).resolve():
        raise UserError(
            f"init_from={init_from!r}: is out_dir too; --init_from=resume goes on with the run, "
            "another --out_dir begins a new one with its weights"
        )
    source = load_config(init_from, config_class=type(config))
    if open_checkpoints(source).latest() is None:
        raise UserError(f"init_from={init_from!r}: there is no checkpoint in it yet")
    return RunWeights(source)
