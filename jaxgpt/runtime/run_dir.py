"""The run directory: what a run leaves on disk, who may write it, and how it is read again."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.config import Config, ModelConfig, UserError, build
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokens import Dataset
from jaxgpt.runtime import distributed
from jaxgpt.runtime.checkpoint import Checkpoints, CorruptCheckpoint, atomic_write
from jaxgpt.train_step import abstract_params

CONFIG, LOCK = "config.json", ".lock"
OURS = (CONFIG, "metrics.jsonl", "loss.png", "log.txt", "tensorboard", "tokenizer.json")


DEFAULTS = Config().to_dict()


@contextmanager
def lock_run_dir(out_dir: str) -> Iterator[None]:
    """Keeps other runs from writing to a run directory; the system lets go when a process dies.

    Raises `UserError` if a run does, and where the disk is full.
    """
    opened: list[int] = []
    distributed.on_process_0(lambda: opened.append(_lock(out_dir)))
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"out_dir={out_dir!r}: {error.strerror}; what is saved is whole") from error
    finally:
        for file in opened:
            os.close(file)


def _lock(out_dir: str) -> int:
    """An open file with the lock; it stays there, since deleting it would race with others."""
    if Path(out_dir).exists() and not Path(out_dir).is_dir():
        raise UserError(f"out_dir={out_dir!r}: is a file, not a folder")
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


def open_checkpoints(config: Config) -> Checkpoints:
    return Checkpoints(Path(config.out_dir, "checkpoints"), config.keep_checkpoints)


def resume_step(config: Config, checkpoints: Checkpoints) -> int:
    """The step to go on from; 0 is a fresh run.

    Raises `UserError` if `init_from` does not fit what the directory holds.
    """
    latest, out_dir = checkpoints.latest(), config.out_dir
    if Path(out_dir).exists() and not Path(out_dir).is_dir():
        raise UserError(f"out_dir={out_dir!r}: is a file, not a folder")
    if latest is None and not config.overwrite and (damaged := checkpoints.damaged()):
        raise UserError(
            f"out_dir={out_dir!r}: all of its checkpoints are damaged, as {damaged[-1].name} is; "
            "--overwrite deletes them and starts anew"
        )
    if config.init_from not in ("resume", "auto"):
        if latest is not None and not config.overwrite:
            raise UserError(
                f"out_dir={out_dir!r}: holds a run of {latest} steps; --init_from=resume goes on "
                "with it, --overwrite deletes it"
            )
        return 0
    if latest is None:
        if config.init_from == "resume":
            raise UserError(f"init_from='resume': there is no checkpoint in {out_dir}")
        return 0
    saved = DEFAULTS | checkpoints.meta(latest)["config"]
    names = (field.name for field in dataclasses.fields(ModelConfig))
    for key in (*names, "scan_layers", "optimizer", "freeze"):
        ours, theirs = getattr(config, key), saved[key]
        if key != "dropout" and ours != theirs:
            raise UserError(f"{key}={ours!r}: the run in {out_dir} has {theirs!r}")
    return latest


def saved_model(config: Config, checkpoints: Checkpoints) -> dict[str, Any]:
    """The model's keys of the run that is to go on; none where a fresh one begins."""
    latest = checkpoints.latest()
    if config.init_from not in ("resume", "auto") or latest is None:
        return {}
    return _model_keys(checkpoints.meta(latest)["config"])


def _model_keys(saved: dict[str, Any]) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(ModelConfig))
    return {name: saved[name] for name in names if name != "dropout" and name in saved}


def merge_model_keys(
    config: Config, theirs: dict[str, Any], whose: str, given: frozenset[str]
) -> Config:
    """`config` with these keys of a model that is there already.

    What the user asked for stands: raises `UserError` where a key differs that is `given` on the
    command line or is not at its default.
    """
    for key, value in theirs.items():
        ours = getattr(config, key)
        if ours != value and (key in given or ours != DEFAULTS[key]):
            raise UserError(f"{key}={ours!r}: {whose} has {value!r}")
    return config.replace(**theirs)


def create(config: Config, dataset: Dataset, *, fresh: bool) -> None:
    """Makes the directory ready: an old run's is cleared for a fresh one, others are left alone.

    Raises `UserError` rather than delete what only looks like a run's.
    """
    folder = Path(config.out_dir)
    there = [path for path in (folder / name for name in (*OURS, "checkpoints")) if path.exists()]
    if fresh and there and not is_run(folder):
        raise UserError(f"out_dir={config.out_dir!r}: {there[0].name} in it is not of a run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={config.out_dir!r}: {error.strerror}") from error
    # first, so that a run killed in the midst of this leaves what is still a run's
    atomic_write(folder / CONFIG, json.dumps(config.to_dict(), indent=1))
    for path in (path for path in there if fresh and path.name != CONFIG):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if dataset.tokenizer:
        atomic_write(folder / tokenizers.FILE, dataset.tokenizer.to_json())


def is_run(folder: Path) -> bool:
    try:
        return "max_iters" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def load_config(out_dir: str) -> Config:
    """The config of the run in `out_dir`. Raises `UserError` if there is none."""
    file = Path(out_dir, CONFIG)
    if not file.is_file():
        raise UserError(f"out_dir={out_dir!r}: there is no run in it ({CONFIG} is missing)")
    try:
        return build(json.loads(file.read_text(encoding="utf-8"))).replace(out_dir=out_dir)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not the config of a run ({error})") from error


def load_params(config: Config, checkpoint: str, mesh: Mesh) -> tuple[dict[str, Any], int]:
    """A run's parameters on the mesh, and the step they are from.

    `checkpoint` is best (the newest where there is none), latest, or a step. In the place of a
    best or latest one that is damaged comes the newest that is not. Raises `UserError`.
    """
    checkpoints = open_checkpoints(config)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"out_dir={config.out_dir!r}: there is no checkpoint in it yet")
    named = {"best": checkpoints.best() or steps[-1], "latest": steps[-1]}
    step = named[checkpoint] if checkpoint in named else int(checkpoint)
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"checkpoint={checkpoint!r}: {config.out_dir} has best, latest, {there}")
    abstract = {"params": abstract_params(config, mesh)}
    others = [other for other in steps if other != step] if checkpoint in named else []
    while True:
        try:
            return checkpoints.restore(abstract, step)["params"], step
        except (
            CorruptCheckpoint
        ) as error:  # not moved aside: a reader leaves the directory as it is
            if not others:
                raise
            step = others.pop()
            print(f"warning: {error}; taking step {step} instead", file=sys.stderr)


@dataclass(frozen=True)
class RunWeights:
    """The best weights of a run, to begin another one with."""

    config: Config

    @property
    def keys(self) -> dict[str, Any]:
        """The model's keys, and how its blocks are kept."""
        return _model_keys(self.config.to_dict()) | {"scan_layers": self.config.scan_layers}

    def load(self, config: Config, mesh: Mesh) -> dict[str, Any]:
        """The parameters on the mesh, without positions past the `block_size` of `config`."""
        params, _ = load_params(self.config, "best", mesh)
        shapes = abstract_params(config, mesh)
        places = jax.tree.map(lambda p: p.sharding, shapes)
        cut = partial(jax.tree.map, lambda p, shape: p[: shape.shape[0]])
        return jax.jit(lambda params: cut(params, shapes), out_shardings=places)(params)

    def check_tokenizer(self, dataset: Dataset) -> None:
        """Raises `UserError` if the ids of a dataset are not those that the run was trained on."""
        file = Path(self.config.out_dir, tokenizers.FILE)
        if not (dataset.tokenizer and file.is_file()):
            return
        if tokenizers.load(file).to_json() != dataset.tokenizer.to_json():
            raise UserError(
                f"init_from={self.config.out_dir!r}: the dataset has another tokenizer; prepare "
                f"it with --tokenizer={file}"
            )


def open_weights(init_from: str, out_dir: str) -> RunWeights:
    """The run that `init_from` names. Raises `UserError` if it is the one to be written."""
    if Path(init_from).resolve() == Path(out_dir).resolve():
        raise UserError(
            f"init_from={init_from!r}: is out_dir too; --init_from=resume goes on with the run, "
            "another --out_dir begins a new one with its weights"
        )
    config = load_config(init_from)
    if open_checkpoints(config).latest() is None:
        raise UserError(f"init_from={init_from!r}: there is no checkpoint in it yet")
    return RunWeights(config)
