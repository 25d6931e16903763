"""Checkpoints: Orbax writes the arrays in the background, a digest makes them count.

<folder>/<step>/{state/..., meta.json, digest.json}, and a link `best` to the step with the lowest
validation loss. The digest is written last: a step without one does not exist.
"""

import json
import os
import shutil
import threading
import zlib
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxgpt import processes
from jaxgpt.config import UserError

FORMAT_VERSION = 1
META, DIGEST, BEST = "meta.json", "digest.json", "best"
READ_BYTES = 1 << 22


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder).absolute(), keep
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
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
        return int(link.resolve().name) if link.is_symlink() else self.meta(BEST)["step"]

    def save(self, state: dict[str, Any], meta: dict[str, Any], *, best: bool) -> None:
        """Copies the state off the device, then writes it in the background.

        `meta` names the step. Raises what went wrong with the save before, if it did.
        """
        self.wait()
        self.newest = meta["step"]
        step = self.folder / str(meta["step"])
        if processes.is_first():
            shutil.rmtree(step, ignore_errors=True)
        items = {k: ocp.args.StandardSave(v) for k, v in state.items() if k != "step"}
        self._orbax.save(step / "state", args=ocp.args.Composite(**items))
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

    def _finish(self, step: Path, meta: dict[str, Any], best: bool) -> None:
        try:
            self._orbax.wait_until_finished()  # which waits for every process's part
            if not processes.is_first():
                return
            meta = {"format_version": FORMAT_VERSION, "versions": _versions()} | meta
            _write(step / META, json.dumps(meta, indent=1))
            _write(step / DIGEST, json.dumps(_digest(step), indent=1))
            if best:
                _link(self.folder / BEST, step.name)
            self._prune()
        except BaseException as error:  # handed to the thread that saves next, or that waits
            self._error = error

    def _prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self._folders():
            if int(step.name) not in kept:
                shutil.rmtree(step, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """The folders of steps, whole or not."""
        return [p for p in self.folder.glob("[0-9]*") if p.name.isdecimal()]

    def meta(self, step: int | str) -> dict[str, Any]:
        """What `save` was told of a step. Raises `UserError` if it is not what was written."""
        file = self.folder / str(step) / META
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            version = int(meta["format_version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not the meta of a checkpoint ({error!r})") from error
        if version > FORMAT_VERSION:
            raise UserError(f"{file}: format {version}; this jaxgpt reads up to {FORMAT_VERSION}")
        _verify(file.parent, META)
        return meta

    def _verify(self, step: int) -> None:
        self.meta(step)
        _verify(self.folder / str(step))

    def restore(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """The items of `abstract` (trees of shapes, types and places) from a step.

        Raises `UserError` if a file is not what was written, or the arrays are not those.
        """
        folder = self.folder / str(step)
        processes.by_first(lambda: self._verify(step))
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
    return {"size": file.stat().st_size, "crc32": checksum}


def _verify(step: Path, *names: str) -> None:
    """Raises `UserError` unless these files of a step, or all of them, are what was written."""
    try:
        written = json.loads((step / DIGEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{step / DIGEST}: not the digest of a checkpoint ({error!r})") from error
    for name in names or written:
        if not (step / name).is_file() or _sums(step / name) != written.get(name):
            raise UserError(f"{step / name}: not what was written there")


def _write(file: Path, text: str) -> None:
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
