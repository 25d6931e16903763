"""Token ids on disk: raw little-endian files, with `meta.json` beside them.

A set of documents has many files per split, in the order of meta.json. Two foreign formats are
read, too: nanoGPT's train.bin and val.bin (no meta: uint16), and llm.c's shards (a header of 256
int32, then uint16), many files in the order of their names.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
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
SplitIds = Iterator[tuple[str, np.ndarray]]  # splits, and some of their ids in order
GPT2_VOCAB = 50_257
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 1024


class TokenSplit:
    """One split as one long sequence of ids, over one file or many, mapped into memory.

    Reading checks every id against `vocab_size`, because a JAX gather silently clamps an id that
    is out of range. A negative number is `~id`: a token that is read but is not a target.
    """

    def __init__(self, files: list[Path], dtype: str, vocab_size: int):
        self.files, self.vocab_size = files, vocab_size
        self._parts = [_open(file, dtype) for file in files]
        self._starts = np.cumsum([0] + [len(part) for part in self._parts])
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Copies `length` ids from `start` on. Raises `UserError` for an id out of range."""
        ids, done = np.empty(length, self.dtype), 0
        part = int(np.searchsorted(self._starts, start, "right")) - 1
        while done < length:
            offset = int(start + done - self._starts[part])
            piece = self._parts[part][offset : offset + length - done]
            if max(int(piece.max()), ~int(piece.min())) >= self.vocab_size:
                at = int(np.argmax((piece >= self.vocab_size) | (piece < -self.vocab_size)))
                found = f"{self.files[part]}: id {piece[at]} at token {offset + at}"
                raise UserError(f"{found} is not below vocab_size={self.vocab_size}")
            ids[done : done + len(piece)] = piece
            done += len(piece)
            part += 1
        return ids

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Reads `length` ids from each start on, [n, `length`]."""
        return np.stack([self.read(int(start), length) for start in starts])

    def starts(
        self, sample_ids: np.ndarray, *, block_size: int, seed: int, stream: int
    ) -> np.ndarray:
        """Returns where the windows of these samples start, int64."""
        keys = {"block_size": block_size, "seed": seed, "stream": stream}
        return window_starts(sample_ids, num_tokens=len(self), **keys)


def _open(file: Path, dtype: str) -> np.ndarray:
    """Maps the ids of a file into memory. Raises `UserError` if it cannot hold whole ids."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    size, offset = file.stat().st_size, 0
    head = np.fromfile(file, "<i4", count=3)
    if len(head) == 3 and head[0] == LLMC_MAGIC:
        offset, dtype = LLMC_HEADER_BYTES, "uint16"
        if size != offset + 2 * max(0, int(head[2])):
            raise UserError(f"{file}: {size} bytes, but its header promises {int(head[2])} tokens")
    if size == offset:
        raise UserError(f"{file}: holds no tokens")
    if (size - offset) % np.dtype(dtype).itemsize:
        raise UserError(f"{file}: {size} bytes is not a whole number of {dtype} ids")
    return np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r", offset=offset)


@dataclass(frozen=True)
class Dataset:
    """The splits of a dataset, and what is known of them."""

    train: TokenSplit
    val: TokenSplit
    vocab_size: int
    tokenizer: Tokenizer | None  # None for foreign files whose tokenizer is not at hand
    source: str  # where the ids came from, for the log
    fingerprint: dict[str, Any]  # what tells this dataset from another, for checkpoints
    example: str = ""  # a prompt for the samples in a run's log; empty takes the first id


def write_partial(files: dict[str, Path], pieces: SplitIds) -> tuple[dict, dict, np.dtype]:
    """Writes the ids of each split to its file with PARTIAL after the name, little-endian.

    All ids have one type -> by split the number of ids and the SHA-256; the type.
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


def name_partial(files: dict[str, Path]) -> None:
    """Gives the files that `write_partial` has written their names."""
    for file in files.values():
        Path(f"{file}{PARTIAL}").replace(file)


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds token files, all of them whole."""
    return any(folder.glob("*.bin")) and not any(folder.glob(f"*{PARTIAL}"))


def open_dataset(folder: Path, data_dir: Path, block_size: int) -> Dataset:
    """Opens a folder that `jaxgpt prepare` made (it has a meta.json), nanoGPT's, or llm.c's.

    Raises `UserError` for files that are missing, damaged, not what the meta says, or too short.
    """
    if any(folder.glob(f"*{PARTIAL}")):
        raise UserError(f"{folder}: its preparation was interrupted; run jaxgpt prepare again")
    is_ours = (folder / META).exists()
    dataset = _open_prepared(folder) if is_ours else _open_foreign(folder, data_dir)
    for tokens in (dataset.train, dataset.val):
        if len(tokens) < block_size + 1:
            few = f"{tokens.files[0]}: {len(tokens)} tokens are too few for block_size={block_size}"
            raise UserError(f"{few}, which needs at least {block_size + 1}")
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
            found = f"{tokens.files[0]}: {len(tokens)} tokens, but {META} says {counts[split]}"
            raise UserError(f"{found}; {of} is cut short or was replaced")
    tokenizer = tokenizers.load(folder / tokenizers.FILE, kind)
    fingerprint = {key: meta.get(key) for key in ("vocab_size", "counts", "sha256")}
    return Dataset(splits["train"], splits["val"], vocab_size, tokenizer, source, fingerprint)


def _open_foreign(folder: Path, data_dir: Path) -> Dataset:
    """Opens files of nanoGPT or llm.c. Their vocabulary is GPT-2's, unless a text shows characters.

    nanoGPT keeps its characters in a pickle, which is not opened, because it could run any code.
    They are those of the input.txt beside it; without that text, the tokenizer is unknown.
    """
    files = {split: sorted(folder.glob(f"*{split}*.bin")) for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            raise UserError(f"{folder}: no {split}.bin, no *{split}*.bin, no {META}")
    train, val = (TokenSplit(files[split], "uint16", GPT2_VOCAB) for split in SPLITS)
    tokenizer, text = None, folder / "input.txt"
    if not (folder / "meta.pkl").exists():
        with suppress(UserError):  # it is not at hand
            tokenizer = tokenizers.gpt2(data_dir)
    elif text.exists():
        chars = {char for piece, _ in read_text(text) for char in piece}
        tokenizer = tokenizers.CharTokenizer("".join(chars).replace("\r", "\n"))  # as open() does
    vocab_size = tokenizer.vocab_size if tokenizer else GPT2_VOCAB
    train.vocab_size = val.vocab_size = vocab_size
    counts = {"train": len(train), "val": len(val)}
    fingerprint = {"vocab_size": vocab_size, "counts": counts}
    return Dataset(train, val, vocab_size, tokenizer, f"token files in {folder}", fingerprint)
