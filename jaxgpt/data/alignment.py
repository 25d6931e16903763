"""Choose the training windows that start where a document starts.

A document starts at an end-of-text id. In llm.c's files this id precedes the document, and in files
of `jaxgpt prepare` it ends the document before. Tokens before the first end-of-text are skipped.
"""

import json
import zipfile
from contextlib import suppress

import numpy as np

from jaxgpt.data.tokens import AlignedSplit, Dataset
from jaxgpt.runtime.files import atomic_path

CACHE = "document_starts.npz"  # beside the token files


def align(dataset: Dataset, end_of_text: int, block_size: int) -> AlignedSplit:
    """Return the train split with windows that start at documents; it may have no window."""
    starts = document_starts(dataset, end_of_text)
    return AlignedSplit(dataset.train, choose_windows(starts, len(dataset.train), block_size))


def choose_windows(starts: np.ndarray, num_tokens: int, block_size: int) -> np.ndarray:
    """Choose the documents where a window starts, so that no token is a target of two windows.

    `starts` are ascending positions, int64 [documents]; the result is int64 [windows]. The first
    window starts with the first document. Each other window starts with the first document at or
    after the last target of the window before. A window may hold several documents. A document that
    starts in the last `block_size` tokens has no window.
    """
    starts = starts[starts < num_tokens - block_size]
    following = np.searchsorted(starts, starts + block_size)
    ahead = np.append(following, len(starts))  # one window after each document, and the end
    chosen = np.zeros(1, np.int64)
    while chosen[-1] < len(starts):  # after round r, 2^r are chosen, and `ahead` is 2^r windows
        chosen = np.append(chosen, ahead[chosen])
        ahead = ahead[ahead]
    return starts[chosen[chosen < len(starts)]]


def document_starts(dataset: Dataset, end_of_text: int) -> np.ndarray:
    """Return the positions of the end-of-text in the train split, int64, in order.

    Finding them reads the whole split, so they are kept in CACHE if the folder is writable.
    """
    files = dataset.train.files
    modified = [file.stat().st_mtime_ns for file in files]
    key = json.dumps([dataset.fingerprint, end_of_text, modified])
    cache = files[0].with_name(CACHE)
    damaged = EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile
    with suppress(OSError, *damaged), np.load(cache) as cached:
        if cached["key"] == key:
            return cached["starts"]
    starts = dataset.train.positions_of(end_of_text)
    with suppress(OSError), atomic_path(cache, shared=True) as file:
        np.savez(file, key=key, starts=starts)
    return starts
