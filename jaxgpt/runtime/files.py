"""Files that are whole or absent, their checksums, and the cores of this machine.

The workers that tokenize documents import this module, so it must not import JAX.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to, with the suffix of `file`, which replaces it at the end.

    After an error or a crash `file` is the old one or the new one, whole. With `shared`, other
    processes may write the same file at the same time.
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
    """Replaces `file` by one with this content (text as UTF-8), or leaves the old one whole."""
    with atomic_path(file, shared=shared) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def sha256_of(file: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cores() -> int:
    """Counts the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
