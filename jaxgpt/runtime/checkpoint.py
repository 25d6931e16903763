"""Checkpoints: Orbax writes the arrays in the background, a digest makes them count.

<folder>/<step>/{state/..., meta.json, digest.json}, and a link `best` to the step with the lowest
validation loss. The digest is written last: a step without one does not exist. A step that is
not what was written is moved to <step>.corrupt, and the one before it is used.
"""

import json
import logging
import math
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxgpt.config import UserError
from jaxgpt.runtime import distributed

FORMAT_VERSION = 1
META, DIGEST, BEST = "meta.json", "digest.json", "best"
READ_BYTES = 1 << 22
SPARE = 1.1  # disk space to ask for, in sizes of the state

for logger in ("absl", "asyncio"):  # Orbax logs tracebacks of what it raises too
    logging.getLogger(logger).setLevel(logging.CRITICAL)


def _tell_no_closed_loop(unraisable: Any, tell: Callable = sys.unraisablehook) -> None:
    """Orbax closes its event loop at the first write that fails; TensorStore reports the others."""
    if str(unraisable.exc_value) != "Event loop is closed":
        tell(unraisable)


sys.unraisablehook = _tell_no_closed_loop


class CorruptCheckpoint(UserError):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder).absolute(), keep
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._sound: set[int] = set()
        self.newest = self.latest()
        """The newest step, on disk or on its way there."""

    def steps(self) -> list[int]:
        """Steps that are whole on disk, in order."""
        return sorted(int(p.name) for p in self._folders() if (p / DIGEST).exists())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        link = self.folder / BEST
        if not (link / DIGEST).exists():
            return None
        if link.is_symlink():
            return int(link.resolve().name)
        try:
            return self.meta(BEST)["step"]
        except CorruptCheckpoint:
            return None

    def damaged(self) -> list[Path]:
        """Steps that were moved aside."""
        return sorted(self.folder.glob("[0-9]*.corrupt"))

    def quarantine_corrupt(self) -> None:
        """Leaves a newest and a best step that are what was written; call it before a run goes on.

        Whatever is not is moved to `<step>.corrupt`, with a line. Of several processes the first
        does so.
        """
        distributed.on_process_0(self._quarantine_corrupt)
        self.newest = self.latest()

    def _quarantine_corrupt(self) -> None:
        newest = next((step for step in reversed(self.steps()) if self._is_sound(step)), -1)
        for folder in self._folders():
            if int(folder.name) > newest:
                _warn(f"{folder}: has no {DIGEST}, so it is not used: its save did not end")
        for step in reversed(self.steps()):
            if self._was_best(step) and self._is_sound(step):
                if step != self.best():  # the run was killed before the link was made
                    _link(self.folder / BEST, str(step))
                break

    def _was_best(self, step: int) -> bool:
        try:
            return step == self.best() or self.meta(step).get("best", False)
        except CorruptCheckpoint:
            return not self._is_sound(step)

    def _is_sound(self, step: int) -> bool:
        """Whether a step is what was written; if it is not, it is moved aside."""
        if step in self._sound:
            return True
        try:
            self._verify(step)
        except CorruptCheckpoint as error:
            folder = self.folder / str(step)
            aside = folder.with_name(f"{step}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            _warn(f"{error}; the checkpoint is damaged and now in {aside.name}")
            return False
        self._sound.add(step)  # `restore` need not read it all again
        return True

    def check_disk_space(self, state: dict[str, Any]) -> None:
        """Raises `UserError` where the disk has no room for another checkpoint of this state."""
        sizes = (math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(state))
        size = int(SPARE * sum(sizes))
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < size:
            raise UserError(
                f"{self.folder}: a checkpoint needs {size / 1e9:.3f} GB and the disk has "
                f"{free / 1e9:.3f} GB free; {self._left()}"
            )

    def _left(self) -> str:
        latest = self.latest()
        return "nothing is saved yet" if latest is None else f"step {latest} is saved"

    def save(self, state: dict[str, Any], meta: dict[str, Any], *, best: bool) -> None:
        """Copies the state off the device, then writes it in the background.

        `meta` names the step. Raises what went wrong with the save before, if it did; `UserError`
        where the disk is full.
        """
        self.wait()
        distributed.on_process_0(partial(self.check_disk_space, state))
        self.newest = meta["step"]
        step = self.folder / str(meta["step"])
        if distributed.is_process_0():
            shutil.rmtree(step, ignore_errors=True)
        items = {k: ocp.args.StandardSave(v) for k, v in state.items() if k != "step"}
        try:
            self._orbax.save(step / "state", args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            raise self._disk_error(error, step) from error
        self._thread = threading.Thread(target=self._finish, args=(step, meta, best))
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is on disk. Raises what went wrong with it, if it did."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _disk_error(self, error: BaseException, step: Path) -> BaseException:
        """A disk's refusal as one line for the user; what else went wrong stays as it is."""
        if not isinstance(error, OSError) and "RESOURCE_EXHAUSTED" not in str(error):
            return error
        shutil.rmtree(step, ignore_errors=True)  # makes room for the user to go on
        why = getattr(error, "strerror", None) or "no space left on the disk"
        return UserError(f"{step}: could not be saved ({why}); {self._left()}")

    def _finish(self, step: Path, meta: dict[str, Any], best: bool) -> None:
        try:
            self._orbax.wait_until_finished()  # which waits for every process's part
            if not distributed.is_process_0():
                return
            meta = {"format_version": FORMAT_VERSION, "versions": _versions(), "best": best} | meta
            atomic_write(step / META, json.dumps(meta, indent=1))
            atomic_write(step / DIGEST, json.dumps(_digest(step), indent=1))
            if best:
                _link(self.folder / BEST, step.name)
            _verify(step, by=_size)  # before older ones go
            self._prune()
        except BaseException as error:  # handed to the thread that saves next, or that waits
            self._error = self._disk_error(error, step)

    def _prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self._folders():
            if int(step.name) not in kept:
                shutil.rmtree(step, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """The folders of steps, whole or not."""
        return [p for p in self.folder.glob("[0-9]*") if p.name.isdecimal()]

    def meta(self, step: int | str) -> dict[str, Any]:
        """What `save` was told of a step. Raises `CorruptCheckpoint` if it is not what was written.

        Raises `UserError` for a later format, whose meta.json and digest.json must stay readable.
        """
        file = self.folder / str(step) / META
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            version = int(meta["format_version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpoint(f"{file}: not the meta of a checkpoint ({error})") from error
        _verify(file.parent, META)
        if version > FORMAT_VERSION:
            raise UserError(f"{file}: format {version}; this jaxgpt reads up to {FORMAT_VERSION}")
        return meta

    def _verify(self, step: int) -> None:
        if (found := self.meta(step)["step"]) != step:
            raise CorruptCheckpoint(f"{self.folder / str(step) / META}: is of step {found}")
        _verify(self.folder / str(step))

    def restore(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """The items of `abstract` (trees of shapes, types and places) from a step.

        Raises `CorruptCheckpoint` if a file is not what was written, `UserError` if the arrays are not those.
        """
        folder = self.folder / str(step)
        distributed.on_process_0(lambda: None if step in self._sound else self._verify(step))
        self._sound.discard(step)
        reader: Any = ocp.StandardCheckpointHandler()
        for item, tree in abstract.items():
            written = reader.metadata(folder / "state" / item)
            there, here = _shapes(written.tree), _shapes(tree)
            for name in there | here:
                if there.get(name) != here.get(name):
                    shapes = f"{there.get(name)} there, {here.get(name)} here"
                    raise UserError(f"{folder}: the shape of {item}.{name} is {shapes}")
        items = {k: ocp.args.StandardRestore(v) for k, v in abstract.items()}
        return dict(self._orbax.restore(folder / "state", args=ocp.args.Composite(**items)))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def _digest(step: Path) -> dict[str, dict[str, int]]:
    """The sums of every file of a step."""
    files = sorted(p for p in step.rglob("*") if p.is_file())
    return {str(file.relative_to(step)): _sums(file) for file in files}


def _sums(file: Path) -> dict[str, int]:
    """Size and CRC-32: what tells bit rot, which Orbax does not see."""
    checksum = 0
    with open(file, "rb") as stream:
        while piece := stream.read(READ_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return _size(file) | {"crc32": checksum}


def _size(file: Path) -> dict[str, int]:
    return {"size": file.stat().st_size}


def _verify(step: Path, *names: str, by: Callable = _sums) -> None:
    """Raises `CorruptCheckpoint` unless these files of a step, or all of them, are what was written."""
    written = _read_digest(step)
    for name in names or written:
        try:
            found = by(step / name)
        except OSError as error:  # it is not there, or in a bad sector
            raise CorruptCheckpoint(f"{step / name}: {error.strerror}") from error
        if not found.items() <= written.get(name, {}).items():
            raise CorruptCheckpoint(f"{step / name}: not what was written there")


def _read_digest(step: Path) -> dict[str, dict[str, int]]:
    try:
        written = json.loads((step / DIGEST).read_text(encoding="utf-8"))
        if META not in written:
            raise ValueError(f"nothing of {META}")
        return {name: dict(sums) for name, sums in written.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(
            f"{step / DIGEST}: not the digest of a checkpoint ({error})"
        ) from error


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def atomic_write(file: Path, text: str) -> None:
    """Writes a file so that after a crash it is there whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _link(link: Path, target: str) -> None:
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    if link.is_dir() and not link.is_symlink():  # some ways to copy a run make a folder of it
        shutil.rmtree(link)
    partial.replace(link)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
