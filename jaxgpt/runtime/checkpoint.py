"""Save and restore checkpoints; Orbax writes the arrays in the background.

A step is <folder>/<step>/{state/..., meta.json, digest.json}, and the link `best` names the step
with the lowest validation loss. The digest is written last; a step without a digest is ignored.
"""

import json
import logging
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxgpt.config import UserError
from jaxgpt.runtime import distributed
from jaxgpt.runtime.files import FULL_DISK, atomic_write

FORMAT_VERSION = 1  # later formats must have a meta.json and a digest.json like these too
META = "meta.json"
DIGEST = "digest.json"
BEST = "best"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")  # the meta names their versions
READ_BYTES = 1 << 22
DISK_MARGIN = 1.1  # a save needs this many times the size of its state on the disk
FREE_SPACE = "try to free space, then --init_from=auto"
AS_SAVED = "expected the file as it was saved"


class CorruptCheckpoint(UserError):
    """The error for checkpoint files that differ from what was written."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self._verified: set[int] = set()
        self.newest = self.latest()  # on disk, or being written

    @cached_property
    def _orbax(self) -> Any:
        """Return Orbax's writer and reader, which take a third of a second to import."""
        import orbax.checkpoint as ocp

        _quiet_orbax()
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def steps(self) -> list[int]:
        """List the steps that are complete on disk, in order."""
        return sorted(int(p.name) for p in self._folders() if (p / DIGEST).exists())

    def _folders(self) -> list[Path]:
        """List the folders of steps, complete or not."""
        return [p for p in self.folder.glob("[0-9]*") if p.name.isdecimal()]

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step with the lowest validation loss, if it exists and is readable."""
        name = read_link(self.folder / BEST)
        if name is not None:
            is_complete = name.isdecimal() and (self.folder / name / DIGEST).exists()
            return int(name) if is_complete else None
        if not (self.folder / BEST / DIGEST).exists():
            return None
        try:  # a folder, as some ways to copy a run make of the link
            return self.meta(BEST)["step"]
        except CorruptCheckpoint:
            return None

    def damaged(self) -> list[Path]:
        """List the folders of quarantined steps."""
        return sorted(self.folder.glob("[0-9]*.corrupt"))

    def quarantine_corrupt(self) -> None:
        """Move corrupt steps to `<step>.corrupt` until the newest and the best are verified."""
        distributed.on_process_0(self._quarantine_corrupt)
        self.newest = self.latest()

    def _quarantine_corrupt(self) -> None:
        newest = next((step for step in reversed(self.steps()) if self._is_verified(step)), -1)
        for folder in self._folders():
            if int(folder.name) > newest:
                warn(f"{folder}: ignored, because its save did not finish; expected a {DIGEST}")
        for step in reversed(self.steps()):
            if self._was_best(step) and self._is_verified(step):
                if step != self.best():  # the run was killed before it made the link
                    make_link(self.folder / BEST, str(step))
                break

    def _was_best(self, step: int) -> bool:
        try:
            return step == self.best() or self.meta(step).get("best", False)
        except CorruptCheckpoint:
            return True  # it may have been, so it must be verified

    def _is_verified(self, step: int) -> bool:
        """Tell whether a step's files are what was written. Quarantine a corrupt step."""
        try:
            self._verify(step)
        except CorruptCheckpoint as error:
            aside = self.folder / f"{step}.corrupt"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
            warn(f"{error}; moved the damaged step to {aside.name}")
            return False
        return True

    def _verify(self, step: int) -> None:
        if step in self._verified:
            return
        found = self.meta(step)["step"]
        if found != step:
            file = self.folder / str(step) / META
            raise CorruptCheckpoint(f"{file}: belongs to step {found}; expected step {step}")
        _verify(self.folder / str(step))
        self._verified.add(step)  # so that `restore` does not read the files again

    def check_disk_space(self, state: Any) -> None:
        """Raise `UserError` if the disk has no room for another checkpoint of this state."""
        size = int(DISK_MARGIN * sum(array.nbytes for array in jax.tree.leaves(state)))
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < size:
            raise UserError(
                f"{self.folder}: the disk has {free / 1e9:.3f} GB free, and {self._saved()}; "
                f"expected {size / 1e9:.3f} GB for a checkpoint; {FREE_SPACE}"
            )

    def _saved(self) -> str:
        latest = self.latest()
        return "nothing is saved yet" if latest is None else f"step {latest} is saved"

    def save(self, items: dict[str, Any], meta: dict[str, Any], *, best: bool) -> None:
        """Copy these trees of arrays off the device, then write them in the background.

        Raises the error of the previous save if that failed, and `UserError` if the disk is full.
        """
        import orbax.checkpoint as ocp

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
        self._writing = self._thread.submit(self._finish, step, meta, best)

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises its error once if it failed."""
        if self._writing:
            writing, self._writing = self._writing, None
            if not distributed.is_process_0():
                writing.result()
            distributed.on_process_0(writing.result)

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Complete the save that is being written if the `with` block fails.

        While Python exits, Orbax can complete no save.
        """
        try:
            yield
        except BaseException:  # also an interrupt, because the run's lock is released next
            if jax.process_count() == 1:  # several processes end at once, and cannot wait
                with suppress(Exception):  # the first error is the one to report
                    self.wait()
            raise

    def _disk_error(self, error: BaseException, step: Path) -> BaseException:
        """Return a `UserError` for an error of the disk, and other errors as they are."""
        is_full = "RESOURCE_EXHAUSTED" in str(error)
        if not isinstance(error, OSError) and not is_full:
            return error
        shutil.rmtree(step, ignore_errors=True)  # the user needs the space to continue
        is_full = is_full or getattr(error, "errno", None) in FULL_DISK
        advice = FREE_SPACE if is_full else "expected a disk that can be written"
        reason = getattr(error, "strerror", None) or "No space left on device"
        return UserError(f"{step}: not saved ({reason.lower()}), {self._saved()}; {advice}")

    def _finish(self, step: Path, meta: dict[str, Any], best: bool) -> None:
        """Complete a step, mark it if it is the best, and delete old steps.

        The next `save` or `wait` raises what this raises.
        """
        try:
            self._orbax.wait_until_finished()  # every process has written its part
            if not distributed.is_process_0():
                return
            versions = {name: version(name) for name in PACKAGES}
            meta = {"format_version": FORMAT_VERSION, "versions": versions, "best": best} | meta
            atomic_write(step / META, json.dumps(meta, indent=1))
            atomic_write(step / DIGEST, json.dumps(make_digest(step), indent=1))
        except BaseException as error:
            raise self._disk_error(error, step) from error
        if best:
            make_link(self.folder / BEST, step.name)
        _verify(step, by=_size)  # before older steps are deleted
        self._delete_old()

    def _delete_old(self) -> None:
        """Delete steps that are not kept, as far as their folders can be written."""
        kept = {*self.steps()[-self.keep :], self.best()}
        for folder in self._folders():
            if int(folder.name) not in kept:
                with suppress(OSError):
                    (folder / DIGEST).unlink(missing_ok=True)  # first, so that it does not count
                    shutil.rmtree(folder, ignore_errors=True)

    def meta(self, step: int | str) -> dict[str, Any]:
        """Read the meta of a step. Raises `CorruptCheckpoint`; `UserError` for a later format."""
        file = self.folder / str(step) / META
        with _reading(file) as meta:
            found = int(meta["format_version"])
        _verify(file.parent, META)
        if found > FORMAT_VERSION:
            advice = f"expected at most {FORMAT_VERSION}; try a newer version of jaxgpt"
            raise UserError(f"{file}: has format {found}; {advice}")
        return meta

    def first_intact(self, steps: Sequence[int]) -> int:
        """Return the first of these steps that is intact, and warn of the damaged ones before it.

        All processes get the same step. Raises `CorruptCheckpoint` if none is intact.
        """
        return distributed.on_process_0(partial(self._first_intact, steps))

    def _first_intact(self, steps: Sequence[int]) -> int:
        step, *others = steps
        try:
            self._verify(step)
        except CorruptCheckpoint as error:  # not quarantined, because readers change nothing
            if not others:
                raise CorruptCheckpoint(f"{error}; try another --checkpoint") from error
            warn(f"{error}; taking step {others[0]} instead")
            return self._first_intact(others)
        return step

    def restore(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """Restore the items of `abstract` (trees of shapes, dtypes and shardings) from a step.

        Raises `CorruptCheckpoint`, and `UserError` if the arrays have other shapes.
        """
        import orbax.checkpoint as ocp

        folder = self.folder / str(step)
        distributed.on_process_0(partial(self._verify, step))
        self._verified.discard(step)
        reader: Any = ocp.StandardCheckpointHandler()
        for item, tree in abstract.items():
            written = _shapes(reader.metadata(folder / "state" / item).tree)
            wanted = _shapes(tree)
            for name in written | wanted:
                found, expected = written.get(name, "missing"), wanted.get(name, "no such array")
                if found != expected:
                    problem = f"the shape of {item}.{name} is {found}"
                    raise UserError(f"{folder}: {problem}; expected {expected} for this model")
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        return dict(self._orbax.restore(folder / "state", args=ocp.args.Composite(**items)))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def make_digest(step: Path) -> dict[str, dict[str, int]]:
    """Compute the checksums of all files of a step."""
    files = sorted(p for p in step.rglob("*") if p.is_file())
    return {str(file.relative_to(step)): checksum(file) for file in files}


def checksum(file: Path) -> dict[str, int]:
    """Compute size and CRC-32, which reveal bit rot that Orbax does not detect."""
    crc32 = 0
    with open(file, "rb") as stream:
        while piece := stream.read(READ_BYTES):
            crc32 = zlib.crc32(piece, crc32)
    return _size(file) | {"crc32": crc32}


def _size(file: Path) -> dict[str, int]:
    return {"size": file.stat().st_size}


def _verify(step: Path, *names: str, by: Callable = checksum) -> None:
    """Raise `CorruptCheckpoint` unless these files (by default all) are what was written."""
    with _reading(step / DIGEST) as digest:
        if META not in digest:
            raise ValueError(f"{META} is missing")
        digest = {name: dict(sums) for name, sums in digest.items()}
    for name in names or digest:
        try:
            found = by(step / name)
        except OSError as error:  # the file is missing, or in a bad sector
            reason = str(error.strerror).lower()
            raise CorruptCheckpoint(f"{step / name}: {reason}; {AS_SAVED}") from error
        if not found.items() <= digest.get(name, {}).items():
            raise CorruptCheckpoint(f"{step / name}: has another checksum; {AS_SAVED}")


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """Yield a file's JSON. Raises `CorruptCheckpoint`, also for an error in the `with` block."""
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"not the {file.stem} of a checkpoint ({error})"
        raise CorruptCheckpoint(f"{file}: {problem}; {AS_SAVED}") from error


def warn(line: str) -> None:
    """Print a warning to stderr, unless that is a closed pipe."""
    with suppress(OSError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def make_link(link: Path, target: str) -> None:
    """Point `link` at `target` atomically, or write the name of `target` into a file."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(target)
    except OSError:  # a file system without links; `best` reads a file too
        partial.write_text(target, encoding="utf-8")
    if link.is_dir() and not link.is_symlink():  # some ways to copy a run make it a folder
        shutil.rmtree(link)
    partial.replace(link)


def read_link(link: Path) -> str | None:
    """Return the target that `make_link` wrote, or None if there is no link."""
    if link.is_symlink():
        return link.readlink().name
    return link.read_text(encoding="utf-8") if link.is_file() else None


@cache
def _quiet_orbax() -> None:
    """Hide what Orbax prints about errors that it also raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        # Orbax closes its event loop at the first failed write; TensorStore reports later ones.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others
