"""Token ids on disk: raw little-endian files, with `meta.json` beside them.

A set of documents has many files a split, in the order of meta.json. Read as they are, too:
nanoGPT's train.bin and val.bin (no meta: uint16), and llm.c's shards (a header of 256 int32, then
uint16), many files in order.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.order import window_starts
from jaxgpt.data.text import read_text
from jaxgpt.data.tokenizer import Tokenizer

META, PARTIAL = "meta.json", ".partial"
SPLITS: tuple[str, ...] = "train", "val"
GPT2_VOCAB = 50_257
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024


class TokenSplit:
    """One split as one long sequence of ids, over one file or many; nothing is read until asked.

    `vocab_size` bounds the ids. What is read is checked against it, because a JAX gather clamps
    an id that is out of range without a word. A negative number is `~id`, a token that is read
    but is not a target.
    """

    def __init__(self, files: list[Path], dtype: str, vocab_size: int):
        self.files, self.vocab_size = files, vocab_size
        self._parts = [_open(file, dtype) for file in files]
        self._starts = np.cumsum([0] + [len(part) for part in self._parts])
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` ids from `start` on, copied. Raises `UserError` for an id out of range."""
        ids = np.empty(length, self.dtype)
        done, part = 0, int(np.searchsorted(self._starts, start, "right")) - 1
        while done < length:
            offset = start + done - self._starts[part]
            piece = self._parts[part][offset : offset + length - done]
            if len(piece) and max(int(piece.max()), ~int(piece.min())) >= self.vocab_size:
                bad = (piece >= self.vocab_size) | (piece < -self.vocab_size)
                at = int(offset + np.argmax(bad))
                raise UserError(
                    f"{self.files[part]}: id {self._parts[part][at]} at token {at} is not below "
                    f"vocab_size={self.vocab_size}"
                )
            ids[done : done + len(piece)] = piece
            done, part = done + len(piece), part + 1
        return ids

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` ids from each of these places on, [n, `length`]."""
        return np.stack([self.read(int(start), length) for start in starts])

    def starts(self, samples: np.ndarray, *, block_size: int, seed: int, stream: int) -> np.ndarray:
        """Where the windows of the samples with these running numbers start, int64."""
        return window_starts(
            samples, num_tokens=len(self), block_size=block_size, seed=seed, stream=stream
        )


def _open(file: Path, dtype: str) -> np.ndarray:
    """A memory map of the ids in one file. Raises `UserError` if it cannot hold whole ids."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    size, offset = file.stat().st_size, 0
    head = np.fromfile(file, "<i4", count=3)
    if len(head) == 3 and head[0] == LLMC_MAGIC:
        offset, dtype = LLMC_HEADER_BYTES, "uint16"
        if size != offset + 2 * max(0, int(head[2])):
            raise UserError(f"{file}: {size} bytes, but its header promises {int(head[2])} tokens")
    width = np.dtype(dtype).itemsize
    if size == offset:
        raise UserError(f"{file}: holds no tokens")
    if (size - offset) % width:
        raise UserError(f"{file}: {size} bytes is not a whole number of {dtype} ids")
    return np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r", offset=offset)


@dataclass(frozen=True)
class Dataset:
    """What a folder of token files holds."""

    train: TokenSplit
    val: TokenSplit
    vocab_size: int
    tokenizer: Tokenizer | None
    """None for nanoGPT's and llm.c's files whose tokenizer is not at hand."""
    source: str
    """Where the ids came from, for people."""
    fingerprint: dict[str, Any]
    """What tells it from another, for checkpoints."""
    example: str = ""
    """A prompt for the samples in a run's log; empty is the tokenizer's first id."""


def write_partial(
    files: dict[str, Path], pieces: Iterable[tuple[str, np.ndarray]]
) -> tuple[dict[str, int], dict[str, str], np.dtype]:
    """Writes ids by split, little-endian, to each split's file with PARTIAL after its name.

    `pieces` are splits and ids, all of one type -> how many ids and the SHA-256 by split, the type.
    """
    digests = {split: hashlib.sha256() for split in files}
    counts, dtype = dict.fromkeys(files, 0), np.dtype("uint16")
    with ExitStack() as stack:
        opened = {s: stack.enter_context(open(f"{files[s]}{PARTIAL}", "wb")) for s in files}
        for split, piece in pieces:
            dtype = piece.dtype
            ids = piece.astype(dtype.newbyteorder("<")).tobytes()
            opened[split].write(ids)
            digests[split].update(ids)
            counts[split] += len(piece)
    return counts, {split: digest.hexdigest() for split, digest in digests.items()}, dtype


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds token files, all of them whole."""
    return any(folder.glob("*.bin")) and not any(folder.glob(f"*{PARTIAL}"))


def open_dataset(folder: Path, data_dir: Path, block_size: int) -> Dataset:
    """The dataset in `folder`: with meta.json if `jaxgpt prepare` made it, else as it is found.

    Raises `UserError` for files that are missing, damaged, too short for one sequence of
    `block_size` tokens and its target, or not what the meta says.
    """
    if any(folder.glob(f"*{PARTIAL}")):
        raise UserError(f"{folder}: its preparation was interrupted; run jaxgpt prepare again")
    if (folder / META).exists():
        dataset = _open_prepared(folder)
    else:
        dataset = _open_foreign(folder, data_dir)
    for tokens in (dataset.train, dataset.val):
        if len(tokens) < block_size + 1:
            raise UserError(
                f"{tokens.files[0]}: {len(tokens)} tokens are too few for block_size={block_size}, "
                f"which needs at least {block_size + 1}"
            )
    return dataset


def _open_prepared(folder: Path) -> Dataset:
    file = folder / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        dtype, vocab_size = meta["dtype"], int(meta["vocab_size"])
        kind, source = meta["tokenizer"], meta["source"]
        counts = {split: int(meta["counts"][split]) for split in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the meta of a dataset ({error!r})") from error
    if dtype not in ("uint16", "uint32", "int32"):
        raise UserError(f"{file}: dtype={dtype!r}: must be uint16, uint32 or int32")
    sums = meta.get("sha256") or {}
    names = {s: [*sums[s]] if isinstance(sums.get(s), dict) else [f"{s}.bin"] for s in SPLITS}
    splits = {s: TokenSplit([folder / n for n in names[s]], dtype, vocab_size) for s in SPLITS}
    for split, tokens in splits.items():
        if len(tokens) != counts[split]:
            of = f"one of {folder / split}_*.bin" if len(tokens.files) > 1 else "the file"
            raise UserError(
                f"{tokens.files[0]}: {len(tokens)} tokens, but {META} says {counts[split]}; "
                f"{of} is cut short or was replaced"
            )
    tokenizer = tokenizers.load(folder / tokenizers.FILE, kind)
    fingerprint = {key: meta.get(key) for key in ("vocab_size", "counts", "sha256")}
    return Dataset(
        train=splits["train"],
        val=splits["val"],
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        source=source,
        fingerprint=fingerprint,
    )


def _open_foreign(folder: Path, data_dir: Path) -> Dataset:
    """Files of nanoGPT or llm.c. Their vocabulary is GPT-2's, unless a text shows characters.

    nanoGPT keeps its characters in a pickle, which could run anything and is not opened; they
    are the sorted characters of the input.txt beside it, and without that there is no tokenizer.
    """
    files = {split: sorted(folder.glob(f"*{split}*.bin")) for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            raise UserError(f"{folder}: no {split}.bin, no *{split}*.bin, no {META}")
    train, val = (TokenSplit(files[split], "uint16", GPT2_VOCAB) for split in SPLITS)
    text = folder / "input.txt"
    if not (folder / "meta.pkl").exists():
        tokenizer = _gpt2_if_at_hand(data_dir)
    elif text.exists():
        chars = {char for piece, _ in read_text(text) for char in piece}
        tokenizer = tokenizers.CharTokenizer("".join(chars).replace("\r", "\n"))  # as open() does
    else:
        tokenizer = None
    vocab_size = tokenizer.vocab_size if tokenizer else GPT2_VOCAB
    train.vocab_size = val.vocab_size = vocab_size
    counts = {"train": len(train), "val": len(val)}
    fingerprint = {"vocab_size": vocab_size, "counts": counts}
    source = f"token files as found in {folder}"
    return Dataset(train, val, vocab_size, tokenizer, source, fingerprint)


def _gpt2_if_at_hand(data_dir: Path) -> Tokenizer | None:
    try:
        return tokenizers.gpt2(data_dir)
    except UserError:
        return None
