"""Keep a run in an object store: `out_dir` is s3://bucket/path or gs://bucket/path.

An object store has no rename and no lock, and Orbax writes to no s3://. So a process works on a
folder of its machine, the mirror, as on any run directory. After each save, a writer uploads what
changed; a reader downloads what it needs. A step is uploaded with its digest last, and an uploaded
step counts only if it has a digest. A lease, which the writer renews, keeps other writers away.
"""

import atexit
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxgpt.config import UserError
from jaxgpt.runtime.bucket import Bucket, StoreError
from jaxgpt.runtime.checkpoint import (
    BEST,
    DIGEST,
    META,
    Checkpoints,
    CorruptCheckpoint,
    make_link,
    read_link,
    warn,
)
from jaxgpt.runtime.files import delete, is_url
from jaxgpt.runtime.lease import OWNERS, Lease

CONFIG = "config.json"
LOCK = ".lock"
RUN_FILES = (
    CONFIG,
    "metrics.jsonl",
    "loss.png",
    "log.txt",
    "tensorboard",
    "tokenizer.json",
    "profile",
    "report.html",
)
STEPS = "checkpoints"
CORRUPT = "digest.json.corrupt"  # the digest of a quarantined step
MIRRORS = Path.home() / ".cache" / "jaxgpt" / "runs"


class Mirror:
    """A folder with the files of a run in a bucket."""

    lease: Lease  # of a writer

    def __init__(self, bucket: Bucket, folder: Path):
        self.bucket, self.folder = bucket, folder
        self.checkpoints: list[Checkpoints] = []  # that may still write in the background
        self._sent: dict[str, tuple[int, int]] = {}
        self._best: str | None = None
        self._had: set[str] = set()  # names of RUN_FILES that were here at the latest upload
        self._publishing = threading.Lock()

    def download(self) -> None:
        """Make the folder equal to the bucket, without the arrays of the steps."""
        self.clear()
        objects = self.bucket.sizes()
        steps = _steps(objects, DIGEST)
        wanted = [f"{STEPS}/{step}/{name}" for step in steps for name in (META, DIGEST)]
        wanted = [name for name in (*RUN_FILES, *wanted) if name in objects]
        self.bucket.download(self.folder, {name: objects[name] for name in wanted})
        for name in RUN_FILES:
            if any(other.startswith(f"{name}/") for other in objects):
                (self.folder / name).mkdir()
        for step in _steps(objects, CORRUPT) - steps:
            (self.folder / STEPS / f"{step}.corrupt").mkdir(parents=True)
        self._best = (self.bucket.read(f"{STEPS}/{BEST}") or b"").decode() or None
        if self._best in steps:
            make_link(self.folder / STEPS / BEST, self._best)
        self._sent = self._files()
        self._had = self._run_files()

    def clear(self) -> None:
        """Delete all files here but those of the lock and the lease."""
        for path in self.folder.iterdir():
            if path.name not in (LOCK, OWNERS):
                delete(path)

    def fetch(self, step: int) -> None:
        """Download the files of a step that are missing here, as far as the bucket has them."""
        name = f"{STEPS}/{step}"
        try:
            digest = json.loads((self.folder / name / DIGEST).read_text(encoding="utf-8"))
            wanted = [f"{name}/{file}" for file in digest]
        except (OSError, ValueError, TypeError):
            return  # a damaged digest, which the caller reports
        missing = [file for file in wanted if not (self.folder / file).is_file()]
        if not missing:
            return
        objects = self.bucket.sizes(name)
        sizes = {file: objects[file] for file in missing if file in objects}
        self.bucket.download(self.folder, sizes)

    def fetch_again(self, step: int) -> None:
        """Download all files of a step, and replace those that are here."""
        name = f"{STEPS}/{step}"
        objects = self.bucket.sizes(name)
        first = {f"{name}/{META}", f"{name}/{DIGEST}"}.intersection(objects)
        shutil.rmtree(self.folder / name)
        (self.folder / name).mkdir()
        self.bucket.download(self.folder, {file: objects[file] for file in first})
        self.fetch(step)

    def publish(self) -> None:
        """Make the bucket equal to the folder. Raises `StoreError`, and `LeaseLost`.

        The metrics come before the steps, so that a step that counts has its rows. A step's digest
        comes after its other files. Old steps are deleted last, each beginning with its digest. If
        no step is left, they are deleted first, so that none has another run's config.
        """
        with self._publishing:
            self.lease.check()
            objects, steps = self.bucket.sizes(), _complete_steps(self.folder / STEPS)
            if not steps:
                self._delete_steps(objects, steps)
            self._publish_files(objects)
            for step in sorted(steps - _steps(objects, DIGEST), key=int):
                self._upload_step(step)
            self._publish_best()
            if steps:
                self._delete_steps(objects, steps)

    def _upload_step(self, step: str) -> None:
        folder = self.folder / STEPS / step
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != DIGEST]
        self.bucket.upload(self.folder, [str(path.relative_to(self.folder)) for path in files])
        self.lease.check()
        self.bucket.upload(self.folder, [f"{STEPS}/{step}/{DIGEST}"])
        shutil.rmtree(f"{folder}.corrupt", ignore_errors=True)  # its objects are overwritten

    def _publish_best(self) -> None:
        best = read_link(self.folder / STEPS / BEST)
        if best == self._best:
            return
        name = f"{STEPS}/{BEST}"
        if best:
            self.bucket.write(name, best.encode())
        else:
            self.bucket.delete([name])  # of a run that was overwritten
        self._best = best

    def _publish_files(self, objects: dict[str, int]) -> None:
        files = self._files()
        self.bucket.upload(self.folder, [n for n in files if files[n] != self._sent.get(n)])
        self._sent = files
        # others may have added files since, such as a report, which stay
        deleted = self._had - self._run_files()
        self.bucket.delete(name for name in objects if name.partition("/")[0] in deleted)
        self._had = self._run_files()

    def _run_files(self) -> set[str]:
        return {name for name in RUN_FILES if self._has(name)}

    def _has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _files(self) -> dict[str, tuple[int, int]]:
        """List the files that are no checkpoint, with their size and time."""
        found = {}
        for path in self.folder.rglob("*"):
            name = str(path.relative_to(self.folder))
            is_ours = name in (LOCK, OWNERS) or ".partial" in path.name
            if path.is_file() and not is_ours and not name.startswith(f"{STEPS}/"):
                found[name] = path.stat().st_size, path.stat().st_mtime_ns
        return found

    def _delete_steps(self, objects: dict[str, int], kept: set[str]) -> None:
        """Delete the bucket's steps that are not here, and mark those that are quarantined here."""
        for step in {name.split("/")[1] for name in objects if name.startswith(f"{STEPS}/")}:
            names = [name for name in objects if name.startswith(f"{STEPS}/{step}/")]
            digest = f"{STEPS}/{step}/{DIGEST}"
            if step in kept:
                self.bucket.delete({f"{STEPS}/{step}/{CORRUPT}"}.intersection(names))
            elif self._has(f"{STEPS}/{step}.corrupt"):
                if digest in names:
                    self.bucket.write(f"{STEPS}/{step}/{CORRUPT}", self.bucket.read(digest) or b"")
                    self.bucket.delete([digest])
            elif not self._has(f"{STEPS}/{step}"):  # else its second download has failed
                self.bucket.delete({digest}.intersection(names))
                self.bucket.delete({*names} - {digest})


class MirroredCheckpoints(Checkpoints):
    """The checkpoints of a mirror: verifying a step downloads it, and saving a step uploads it."""

    def __init__(self, mirror: Mirror, keep: int):
        self.mirror = mirror
        mirror.checkpoints.append(self)
        super().__init__(mirror.folder / STEPS, keep)

    def _verify(self, step: int) -> None:
        """Verify a step; if it seems damaged, download it again, as the network may have failed.

        Raises `CorruptCheckpoint`, and `StoreError` if the step cannot be downloaded.
        """
        self.mirror.fetch(step)
        try:
            super()._verify(step)
        except CorruptCheckpoint:
            self.mirror.fetch_again(step)
            super()._verify(step)

    def restore(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        self.mirror.fetch(step)  # each process reads a mirror of its own, and only one verifies it
        return super().restore(abstract, step)

    def _finish(self, step: Path, meta: dict[str, Any], best: bool) -> None:
        super()._finish(step, meta, best)
        try:
            self.mirror.publish()
        except StoreError as error:
            warn(f"{error}; step {step.name} is uploaded with the next save")


_mirrors: dict[str, Mirror] = {}  # that this process works on


def local(path: str) -> Path:
    """Return the folder of a run on this machine: the path itself, or the mirror of a URL."""
    if not is_url(path):
        return Path(path)
    return _mirror(path).folder


def checkpoints(out_dir: str, keep: int) -> Checkpoints:
    """Open the checkpoints of a run."""
    if not is_url(out_dir):
        return Checkpoints(Path(out_dir, STEPS), keep)
    return MirroredCheckpoints(_mirror(out_dir), keep)


def _mirror(url: str) -> Mirror:
    """Return the mirror that this process works on; open one to read if there is none."""
    return _mirrors.get(url) or open_to_read(url)


def open_to_read(url: str) -> Mirror:
    """Download the run at a URL as it is now, except for arrays, and return its mirror."""
    mirror = _mirrors.get(url)
    if mirror is None:
        bucket = Bucket(url, url)
        parent = tempfile.mkdtemp(prefix="jaxgpt-")
        atexit.register(partial(shutil.rmtree, parent, ignore_errors=True))
        folder = Path(parent, Path(url).name)
        folder.mkdir()
        mirror = Mirror(bucket, folder)
    if not hasattr(mirror, "lease"):
        mirror.download()
    _mirrors[url] = mirror
    return mirror


def mirror_folder(out_dir: str) -> Path:
    """Return the folder in which a writer works: the path itself, or this machine's for a URL."""
    if not is_url(out_dir):
        return Path(out_dir)
    Bucket(out_dir, f"out_dir={out_dir!r}")  # fails if the extra is missing
    if jax.process_count() > 1:
        raise UserError(
            f"out_dir={out_dir!r}: {jax.process_count()} processes would write to an object store; "
            "expected one process; try a folder that all processes share, such as a mounted bucket"
        )
    return MIRRORS / hashlib.sha256(out_dir.encode()).hexdigest()[:16] / Path(out_dir).name


@contextmanager
def open_to_write(out_dir: str) -> Iterator[None]:
    """Hold the lease of a run in a bucket, and publish its mirror at the end.

    The mirror must be locked. Does nothing for a folder. Raises `UserError`.
    """
    if not is_url(out_dir):
        yield
        return
    mirror = Mirror(Bucket(out_dir, f"out_dir={out_dir!r}"), mirror_folder(out_dir))
    with Lease(mirror.bucket, mirror.folder) as mirror.lease:
        mirror.download()
        _mirrors[out_dir] = mirror
        try:
            yield
        except Exception:
            with suppress(Exception):  # the next start deletes what is not uploaded
                _finish(mirror)
            raise
        finally:
            _mirrors.pop(out_dir, None)
        _finish(mirror)


def _finish(mirror: Mirror) -> None:
    for checkpoints in mirror.checkpoints:
        checkpoints.wait()
    mirror.publish()
    mirror.clear()  # it may be large


def publish(out_dir: str) -> None:
    """Upload what changed in a writer's mirror. Does nothing for a folder."""
    if is_url(out_dir):
        _mirrors[out_dir].publish()


def upload(url: str, name: str) -> None:
    """Upload one file of the mirror."""
    mirror = _mirrors[url]
    mirror.bucket.upload(mirror.folder, [name])


def _steps(objects: dict[str, int], name: str) -> set[str]:
    """Return the steps, as text, that have an object of this name."""
    parts = [path.split("/") for path in objects]
    return {p[1] for p in parts if len(p) == 3 and p[0] == STEPS and p[2] == name}


def _complete_steps(folder: Path) -> set[str]:
    """Return the names of the steps in a folder that have a digest."""
    return {
        path.parent.name for path in folder.glob(f"[0-9]*/{DIGEST}") if path.parent.name.isdecimal()
    }
