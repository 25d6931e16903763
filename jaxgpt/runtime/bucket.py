"""Read and write objects of an object store, s3:// or gs://, and copy datasets from there.

The packages are imported when a URL is used. The data loaders import this module, so it must not
import JAX.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxgpt.config import UserError
from jaxgpt.runtime.files import FULL_DISK, is_url, make_folder, only_writer

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # scheme -> the package with its file system
CONNECT_S = 10
READ_S = 30  # a silent server is asked again after so many seconds
ATTEMPTS = 5  # per request, with growing pauses; AWS_MAX_ATTEMPTS overrides it
PARALLEL = 8  # files at a time
PARTS = 2  # of a large file at a time, each of 50 MB in memory
DATA = Path.home() / ".cache" / "jaxgpt" / "data"


class StoreError(UserError):
    """A request to an object store failed, or a download is incomplete."""


class Bucket:
    """The objects under one URL. Every method raises `StoreError` if the store fails."""

    def __init__(self, url: str, subject: str):
        scheme = url.partition("://")[0]
        if scheme not in PACKAGES:
            stores = " or ".join(f"{known}://bucket/path" for known in PACKAGES)
            raise UserError(f"{subject}: unknown kind of object store; expected a folder, {stores}")
        self.url, self.subject = url.rstrip("/"), subject
        options: dict[str, Any] = {"use_listings_cache": False}
        if scheme == "s3":
            attempts = os.environ.get("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
            if not attempts.isdecimal():
                problem = "invalid value; expected a whole number"
                raise UserError(f"AWS_MAX_ATTEMPTS={attempts!r}: {problem}")
            retries = {"mode": "standard", "total_max_attempts": int(attempts)}
            timeouts = {"connect_timeout": CONNECT_S, "read_timeout": READ_S}
            options["config_kwargs"] = {"retries": retries, **timeouts}
            options["max_concurrency"] = PARTS
        try:
            import fsspec

            with self._asking():
                self._store = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            problem, advice = f"needs {PACKAGES[scheme]}", "try pip install 'jaxgpt[cloud]'"
            raise UserError(f"{subject}: {problem}; expected the extra cloud; {advice}") from error
        self._root = self.url.partition("://")[2]

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # s3fs, botocore, aiohttp and gcsfs raise many types
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise  # by the disk of this machine
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise StoreError(
                f"{self.subject}: the object store failed ({reason}); expected a bucket that can "
                "be read and written; try to check its name, its credentials and AWS_ENDPOINT_URL"
            ) from error

    def sizes(self, under: str = "") -> dict[str, int]:
        """List the objects in a folder: their names below the URL, and their sizes in bytes.

        An empty object whose name ends with a slash, as S3's console makes for a folder, is no
        file and is left out.
        """
        with self._asking():
            found = self._store.find(self._path(under).rstrip("/"), detail=True)
        start = len(self._root) + 1
        sizes = {path[start:]: info["size"] for path, info in found.items()}
        return {name: size for name, size in sizes.items() if name and not name.endswith("/")}

    def read(self, name: str) -> bytes | None:
        """Read an object, or return None if there is none."""
        with self._asking():
            try:
                return self._store.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with self._asking():
            self._store.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists, and return whether it was written."""
        with self._asking():
            try:
                self._store.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects one by one, because a request for many does not report failures."""

        def delete_one(path: str) -> None:
            with suppress(FileNotFoundError):
                self._store.rm_file(path)

        with self._asking(), ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(delete_one, map(self._path, names)))

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Upload files of a folder, several at a time."""
        pairs = [(str(folder / name), self._path(name)) for name in names]
        self._copy(self._store.put_file, pairs)

    def download(self, folder: Path, sizes: dict[str, int]) -> None:
        """Download objects, of at least these bytes, to a folder, several at a time."""
        pairs = [(self._path(name), str(folder / name)) for name in sizes]
        for _, file in pairs:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._copy(self._store.get_file, pairs)
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            problem = f"{self.url}: an object was deleted while it was read"
            raise StoreError(f"{problem}; expected all that the listing had; try again") from error
        for name, size in sizes.items():
            if (folder / name).stat().st_size < size:  # one that a run appends to may have grown
                (folder / name).unlink()
                problem = f"{self.url}/{name}: the download was not complete"
                raise StoreError(f"{problem}; expected {size} bytes; try again")

    def _copy(self, copy: Callable[[str, str], None], pairs: list[tuple[str, str]]) -> None:
        with self._asking(), ThreadPoolExecutor(PARALLEL) as pool:
            for done in [pool.submit(copy, *pair) for pair in pairs]:
                done.result()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def local_data_dir(data_dir: str, dataset: str) -> Path:
    """Return the folder of the datasets on this machine; copy a dataset there from a URL.

    Files are copied if they are missing, or if their size or the dataset's meta.json differs.
    GPT-2's encoding is copied too. Raises `UserError`.
    """
    if not is_url(data_dir):
        return Path(data_dir)
    bucket = Bucket(data_dir, f"data_dir={data_dir!r}")
    folder = DATA / hashlib.sha256(bucket.url.encode()).hexdigest()[:16]
    make_folder(folder, str(folder), "HOME")
    with only_writer(folder):  # the processes of this machine share the copy
        for name in {dataset, "gpt2"}:
            _copy_changed(bucket, name, folder)
    return folder


def _copy_changed(bucket: Bucket, name: str, folder: Path) -> None:
    """Copy a dataset's new and changed files, and delete token files that the bucket lacks."""
    objects, meta = bucket.sizes(name), f"{name}/meta.json"
    if not objects:  # such as a corpus, which is prepared on this machine
        return
    if meta in objects and _bytes_of(folder / meta) != bucket.read(meta):
        changed = objects
    else:
        here = {f: (folder / f).stat().st_size for f in objects if (folder / f).is_file()}
        changed = {file: size for file, size in objects.items() if here.get(file) != size}
    # else the bucket has only a corpus's text, and this machine has made the token files
    has_tokens = meta in objects or any(file.endswith(".bin") for file in objects)
    for file in (folder / name).glob("*.bin"):
        if has_tokens and f"{name}/{file.name}" not in objects:
            file.unlink()
    if not changed:
        return
    megabytes = sum(changed.values()) / 1e6
    print(f"{bucket.url}/{name}: copying {megabytes:,.1f} MB to {folder}", file=sys.stderr)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a copy that was killed
    try:
        bucket.download(partial, changed)
        for file in sorted(changed, key=lambda file: file == meta):  # meta.json last
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).replace(folder / file)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
