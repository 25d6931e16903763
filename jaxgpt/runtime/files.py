"""Write files atomically, and tell what this machine has: folders, CPU cores, optional packages.

The workers that tokenize documents import this module, so it must not import JAX.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxgpt.config import UserError

FULL_DISK = errno.ENOSPC, errno.EDQUOT
# The disk is full, or the folder cannot be written.
DISK_ERRORS = *FULL_DISK, errno.EACCES, errno.EPERM, errno.EROFS
# A path that the user gave cannot be used.
PATH_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


@contextmanager
def atomic_path(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `file`, and rename it to `file` at the end.

    After an error or a crash, `file` has its old content or the new one, never a part. With
    `shared`, other processes may write the same file at the same time.
    """
    unique = f".{secrets.token_hex(4)}" if shared else ""
    partial = file.with_name(f".{file.stem}{unique}.partial{file.suffix}")
    try:
        yield partial
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(file: Path, data: str | bytes, *, shared: bool = False) -> None:
    """Write `data` (text as UTF-8) to `file` through `atomic_path`."""
    with atomic_path(file, shared=shared) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def delete(path: Path) -> None:
    """Delete a folder, a file or a link if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; wait first until no other process holds it.

    A network file system without such locks lets all processes in at once.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def sha256_of(file: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_url(path: str) -> bool:
    """Tell whether a path names an object store."""
    return "://" in path


def reject_url(key: str, path: str) -> None:
    """Raise `UserError` if a path names an object store."""
    if is_url(path):
        raise UserError(f"{key}={path!r}: is in an object store; expected a folder")


def check_file_to_write(file: Path) -> None:
    """Raise `UserError` if a file to write is a folder, or if its folder does not exist."""
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}; try mkdir -p {file.parent}")
    if file.is_dir():
        raise UserError(f"{file}: is a folder; expected a file to write")


def make_folder(folder: str | Path, subject: str, key: str) -> None:
    """Make a folder and its parents. Raises the `folder_error` of `subject` and `key`."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise folder_error(subject, key, error) from error


def folder_error(subject: str, key: str, error: OSError) -> UserError:
    """Return the error for a folder that cannot be written; `key` chooses another folder."""
    is_file = isinstance(error, FileExistsError)
    problem = "is a file" if is_file else (error.strerror or type(error).__name__).lower()
    return UserError(f"{subject}: {problem}; expected a writable folder; try another {key}")


def reason(error: Exception) -> str:
    """Say in plain words, on one line, why a file could not be read."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "is a folder"
        case OSError():
            return (error.strerror or type(error).__name__).lower()
        case UnicodeDecodeError():
            return f"byte {error.start} is not UTF-8"
        case json.JSONDecodeError():
            return f"line {error.lineno} is not valid JSON"
    return " ".join(str(error).split())


def import_extra(module: str, subject: str, extra: str) -> Any:
    """Import a module of one of jaxgpt's extras. Raises `UserError` if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"{subject}: needs {package}; try pip install 'jaxgpt[{extra}]'") from error
