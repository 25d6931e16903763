"""Checkpoints: Orbax writes the arrays in the background, a digest makes them count.

<folder>/<step>/{state/..., meta.json, digest.json}, and a link `best` to the step with the lowest
validation loss. The digest is written last: a step without one does not exist. A step whose files
are not what was written is moved to <step>.corrupt, and the step before it is used.
"""

import json
import logging
import math
import shutil
import sys
import threading
import zlib
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxgpt.config import UserError
from jaxgpt.runtime import distributed
from jaxgpt.runtime.files import atomic_write

FORMAT_VERSION = 1
META, DIGEST, BEST = "meta.json", "digest.json", "best"
READ_BYTES = 1 << 22
DISK_MARGIN = 1.1  # free disk space that a save needs, in sizes of its state


class CorruptCheckpoint(UserError):
    """A checkpoint's files are not what was written."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder).absolute(), keep
        _quiet_orbax()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._verified: set[int] = set()
        self.newest = self.latest()
        """The newest step, on disk or on its way there."""

    def steps(self) -> list[int]:
        """Lists the steps that are whole on disk, in order."""
        return sorted(int(p.name) for p in self._folders() if (p / DIGEST).exists())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the lowest validation loss, if it is there and readable."""
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
        """Lists the folders of quarantined steps."""
        return sorted(self.folder.glob("[0-9]*.corrupt"))

    def quarantine_corrupt(self) -> None:
        """Moves corrupt steps to `<step>.corrupt` until the newest and the best one are verified.

        Call it before a run is resumed. Of several processes, process 0 does the work.
        """
        distributed.on_process_0(self._quarantine_corrupt)
        self.newest = self.latest()

    def _quarantine_corrupt(self) -> None:
        newest = next((step for step in reversed(self.steps()) if self._is_verified(step)), -1)
        for folder in self._folders():
            if int(folder.name) > newest:
                _warn(f"{folder}: has no {DIGEST}, so it is not used: its save did not end")
        for step in reversed(self.steps()):
            if self._was_best(step) and self._is_verified(step):
                if step != self.best():  # the run was killed before the link was made
                    _link(self.folder / BEST, str(step))
                break

    def _was_best(self, step: int) -> bool:
        try:
            return step == self.best() or self.meta(step).get("best", False)
        except CorruptCheckpoint:
            return not self._is_verified(step)

    def _is_verified(self, step: int) -> bool:
        """Whether a step's files are what was written. A corrupt step is quarantined."""
        if step in self._verified:
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
        self._verified.add(step)  # `restore` need not read it all again
        return True

    def check_disk_space(self, state: Any) -> None:
        """Raises `UserError` where the disk has no room for another checkpoint of this state."""
        sizes = [math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(state)]
        size = int(DISK_MARGIN * sum(sizes))
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < size:
            raise UserError(
                f"{self.folder}: a checkpoint needs {size / 1e9:.3f} GB and the disk has "
                f"{free / 1e9:.3f} GB free; {self._saved()}"
            )

    def _saved(self) -> str:
        latest = self.latest()
        return "nothing is saved yet" if latest is None else f"step {latest} is saved"

    def save(self, items: dict[str, Any], meta: dict[str, Any], *, best: bool) -> None:
        """Copies these trees of arrays off the device, then writes them in the background.

        `meta["step"]` is their step. Raises the error of the save before, if it failed, and
        `UserError` where the disk is full.
        """
        self.wait()
        distributed.on_process_0(partial(self.check_disk_space, items))
        self.newest = meta["step"]
        step = self.folder / str(meta["step"])
        if distributed.is_process_0():
            shutil.rmtree(step, ignore_errors=True)
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            self._orbax.save(step / "state", args=ocp.args.Composite(**trees))
        except (OSError, ValueError) as error:
            raise self._disk_error(error, step) from error
        self._thread = threading.Thread(target=self._finish, args=(step, meta, best))
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises its error, if it failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _disk_error(self, error: BaseException, step: Path) -> BaseException:
        """Turns a disk's refusal into one line for the user; other errors stay as they are."""
        if not isinstance(error, OSError) and "RESOURCE_EXHAUSTED" not in str(error):
            return error
        shutil.rmtree(step, ignore_errors=True)  # makes room for the user to go on
        why = getattr(error, "strerror", None) or "no space left on the disk"
        return UserError(f"{step}: could not be saved ({why}); {self._saved()}")

    def _finish(self, step: Path, meta: dict[str, Any], best: bool) -> None:
        try:
            self._orbax.wait_until_finished()  # every process has written its part
            if not distributed.is_process_0():
                return
            meta = {"format_version": FORMAT_VERSION, "versions": _versions(), "best": best} | meta
            atomic_write(step / META, json.dumps(meta, indent=1))
            atomic_write(step / DIGEST, json.dumps(make_digest(step), indent=1))
            if best:
                _link(self.folder / BEST, step.name)
            _verify(step, by=_size)  # before older steps are deleted
            self._prune()
        except BaseException as error:  # raised by the next `save` or `wait`
            self._error = self._disk_error(error, step)

    def _prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self._folders():
            if int(step.name) not in kept:
                shutil.rmtree(step, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Lists the folders of steps, whole or not."""
        return [p for p in self.folder.glob("[0-9]*") if p.name.isdecimal()]

    def meta(self, step: int | str) -> dict[str, Any]:
        """Reads the meta of a step. Raises `CorruptCheckpoint` if it is not what was written.

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
        found = self.meta(step)["step"]
        if found != step:
            raise CorruptCheckpoint(f"{self.folder / str(step) / META}: is of step {found}")
        _verify(self.folder / str(step))

    def restore(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """Restores the items of `abstract` (trees of shapes, types and shardings) from a step.

        Raises `CorruptCheckpoint` if a file is not what was written, and `UserError` if the arrays
        have other shapes.
        """
        folder = self.folder / str(step)
        distributed.on_process_0(lambda: None if step in self._verified else self._verify(step))
        self._verified.discard(step)
        reader: Any = ocp.StandardCheckpointHandler()
        for item, tree in abstract.items():
            written = reader.metadata(folder / "state" / item)
            there, here = _shapes(written.tree), _shapes(tree)
            for name in there | here:
                if there.get(name) != here.get(name):
                    shapes = f"{there.get(name)} there, {here.get(name)} here"
                    raise UserError(f"{folder}: the shape of {item}.{name} is {shapes}")
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        return dict(self._orbax.restore(folder / "state", args=ocp.args.Composite(**items)))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def make_digest(step: Path) -> dict[str, dict[str, int]]:
    """Computes the checksums of all files of a step."""
    files = sorted(p for p in step.rglob("*") if p.is_file())
    return {str(file.relative_to(step)): checksum(file) for file in files}


def checksum(file: Path) -> dict[str, int]:
    """Computes size and CRC-32, which reveal bit rot that Orbax does not see."""
    crc32 = 0
    with open(file, "rb") as stream:
        while piece := stream.read(READ_BYTES):
            crc32 = zlib.crc32(piece, crc32)
    return _size(file) | {"crc32": crc32}


def _size(file: Path) -> dict[str, int]:
    return {"size": file.stat().st_size}


def _verify(step: Path, *names: str, by: Callable = checksum) -> None:
    """Raises `CorruptCheckpoint` unless these files (by default all) are what was written."""
    digest = _read_digest(step)
    for name in names or digest:
        try:
            found = by(step / name)
        except OSError as error:  # it is missing, or in a bad sector
            raise CorruptCheckpoint(f"{step / name}: {error.strerror}") from error
        if not found.items() <= digest.get(name, {}).items():
            raise CorruptCheckpoint(f"{step / name}: not what was written there")


def _read_digest(step: Path) -> dict[str, dict[str, int]]:
    file = step / DIGEST
    try:
        digest = json.loads(file.read_text(encoding="utf-8"))
        if META not in digest:
            raise ValueError(f"nothing of {META}")
        return {name: dict(sums) for name, sums in digest.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{file}: not the digest of a checkpoint ({error})") from error


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _link(link: Path, target: str) -> None:
    """Points `link` at `target` atomically."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    if link.is_dir() and not link.is_symlink():  # some ways to copy a run make a folder of it
        shutil.rmtree(link)
    partial.replace(link)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}


@cache
def _quiet_orbax() -> None:
    """Hides, once per process, what Orbax prints of errors that it also raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        # Orbax closes its event loop at the first failed write; TensorStore reports the others
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others
