"""Read and write token ids: raw little-endian files with `meta.json` beside them.

A set of documents has many files per split, in the order of meta.json. Two foreign formats can be
read too: nanoGPT's train.bin and val.bin (uint16, no meta.json), and llm.c's shards (a header of
256 int32, then uint16), in the order of their names.
"""

import hashlib
import json
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import UserError
from jaxgpt.data import foreign
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.order import epoch_keys, permute, window_starts
from jaxgpt.data.text import read_text
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.runtime.files import reason

META = "meta.json"
PARTIAL = ".partial"
SPLITS: tuple[str, ...] = "train", "val"
SplitIds = Iterator[tuple[str, np.ndarray]]  # a split, and the next of its ids
GPT2_VOCAB = 50_257
LLMC_MAGIC = 20240520
LLMC_HEADER_BYTES = 1024
OPEN_FILES = 65_536
SCAN_IDS = 1 << 22  # compared at once, so that they stay in the processor's cache
AGAIN = "try jaxgpt prepare again"
LARGER = "try a larger --vocab_size, if the ids are of another vocabulary"
PADDED_GPT2 = range(GPT2_VOCAB, GPT2_VOCAB + 128)  # values of vocab_size that mean GPT-2's


class TokenSplit:
    """One split as one long sequence of ids in one or many files, which stay open.

    Reading checks every id against `vocab_size`, because a JAX gather silently clamps an id that
    is out of range. A negative number is `~id`: a token that is read but is not a target.
    """

    def __init__(self, files: list[Path], dtype: str, vocab_size: int, advice: str = AGAIN):
        self.files = files
        self.vocab_size = vocab_size
        self.advice = advice  # for an id out of range
        self._layouts = [_layout(file, dtype) for file in files]
        self.dtype = self._layouts[0].dtype
        self._file_starts = np.cumsum([0] + [layout.tokens for layout in self._layouts])
        self._opened = [os.open(file, os.O_RDONLY) for file in files]
        for file in self._opened:
            weakref.finalize(self, os.close, file)

    def __len__(self) -> int:
        return int(self._file_starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Copy `length` ids from `start` on. Raises `UserError` for an id out of range."""
        ids, done = np.empty(length, self.dtype), 0
        part = int(np.searchsorted(self._file_starts, start, "right")) - 1
        while done < length:
            offset = int(start + done - self._file_starts[part])
            end = done + int(self._file_starts[part + 1] - self._file_starts[part]) - offset
            piece = ids[done:end]
            self._read_into(piece, part, offset)
            # the largest id, and the largest among those that are written as ~id
            if max(int(piece.max()), ~int(piece.min())) >= self.vocab_size:
                at = int(np.argmax((piece >= self.vocab_size) | (piece < -self.vocab_size)))
                problem = f"id {piece[at]} at token {offset + at} is out of range"
                limit = f"expected ids below vocab_size={self.vocab_size}"
                raise UserError(f"{self.files[part]}: {problem}; {limit}; {self.advice}")
            done += len(piece)
            part += 1
        return ids

    def _read_into(self, piece: np.ndarray, part: int, offset: int) -> None:
        """Fill `piece` with the ids of a file from `offset` on.

        Random windows of a memory map make the system read megabytes around each of them, and
        count as the memory of the process (docs/performance.md, "Windows by pread").
        """
        wanted = piece.view(np.uint8).data
        at = self._layouts[part].offset + offset * self.dtype.itemsize
        while wanted:  # one call reads at most 2 GB
            count = os.preadv(self._opened[part], [wanted], at)
            if count == 0:
                problem = "has become shorter since it was opened"
                raise UserError(f"{self.files[part]}: {problem}; expected a complete file; {AGAIN}")
            wanted = wanted[count:]
            at += count

    def head(self, part: int, length: int) -> np.ndarray:
        """Copy at most `length` ids from the start of a file, without a check of their range."""
        return np.array(self._map(part)[:length])

    def largest_id(self) -> int:
        """Return the largest id of the split, by reading all of it."""
        return max(int(self._map(part).max()) for part in range(len(self.files)))

    def _map(self, part: int) -> np.ndarray:
        """Map the ids of a file into memory, to read them in order."""
        dtype, offset, _ = self._layouts[part]
        return np.memmap(self.files[part], dtype, "r", offset=offset)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read `length` ids from each start on, [n, `length`]."""
        return np.stack([self.read(int(start), length) for start in starts])

    def positions_of(self, id: int) -> np.ndarray:
        """Find every position of an id, int64, by reading the whole split."""
        found = [np.empty(0, np.int64)]
        for part, start in enumerate(self._file_starts[:-1]):
            ids = self._map(part)
            for at in range(0, len(ids), SCAN_IDS):
                found.append(start + at + np.flatnonzero(ids[at : at + SCAN_IDS] == id))
        return np.concatenate(found)

    def starts(
        self, sample_ids: np.ndarray, *, block_size: int, seed: int, stream: int
    ) -> np.ndarray:
        """Return where the windows of these samples start, int64."""
        keys = {"block_size": block_size, "seed": seed, "stream": stream}
        return window_starts(sample_ids, num_tokens=len(self), **keys)


class AlignedSplit(TokenSplit):
    """A split whose windows start at `window_starts`, in a random order in each epoch."""

    def __init__(self, tokens: TokenSplit, window_starts: np.ndarray):
        super().__init__(tokens.files, tokens.dtype.name, tokens.vocab_size)
        self.window_starts = window_starts

    def starts(self, sample_ids: np.ndarray, *, seed: int, stream: int, **_: int) -> np.ndarray:
        """Return where the windows of these samples start, int64. An epoch has each window once."""
        count = len(self.window_starts)
        epochs, numbers = np.divmod(sample_ids.astype(np.uint64), np.uint64(count))
        order = permute(numbers, count, epoch_keys(epochs, seed, stream))
        return self.window_starts[order.astype(np.int64)]


def _allow_open_files() -> None:
    """Let this process have as many files open as the system allows, but at most OPEN_FILES.

    A set of documents may have more files than the usual limit of 1,024, or of 256 on macOS.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if 0 <= now < limit:  # -1 is no limit
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


class _Layout(NamedTuple):
    """The dtype of a file's ids, the bytes before the first one, and the number of tokens."""

    dtype: np.dtype
    offset: int
    tokens: int


def _layout(file: Path, dtype: str) -> _Layout:
    """Read the layout of a file. Raises `UserError` if the file does not hold whole ids."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected token ids; {AGAIN}")
    size, offset = file.stat().st_size, 0
    head = np.fromfile(file, "<i4", count=3)
    if len(head) == 3 and head[0] == LLMC_MAGIC:
        offset, dtype = LLMC_HEADER_BYTES, "uint16"
        expected = offset + 2 * max(0, int(head[2]))
        if size != expected:
            advice = f"expected {expected} for the {int(head[2])} tokens of its header"
            raise UserError(f"{file}: holds {size} bytes; {advice}; try another copy of the file")
    if size == offset:
        raise UserError(f"{file}: holds no tokens; expected at least one; {AGAIN}")
    little_endian = np.dtype(dtype).newbyteorder("<")
    count, rest = divmod(size - offset, little_endian.itemsize)
    if rest:
        problem = f"holds {size} bytes, which is not a whole number of {dtype} ids"
        raise UserError(f"{file}: {problem}; expected a complete file; {AGAIN}")
    return _Layout(little_endian, offset, count)


@dataclass(frozen=True)
class Dataset:
    """The two splits of a dataset, their tokenizer and their origin."""

    train: TokenSplit
    val: TokenSplit
    vocab_size: int
    tokenizer: Tokenizer | None  # None for foreign files if their tokenizer is unknown
    source: str  # where the ids came from, for the log
    fingerprint: dict[str, Any]  # identifies the dataset in checkpoints
    example: str = ""  # a prompt for the samples in the log; empty means `default_prompt`
    aligned: AlignedSplit | None = None  # the train split with the windows of align_documents
    notes: tuple[str, ...] = ()  # what was assumed about the files, for the log


def write_partial(files: dict[str, Path], pieces: SplitIds) -> tuple[dict, dict, np.dtype]:
    """Write the ids of each split, little-endian, to its file with PARTIAL after the name.

    All ids have one dtype. Return the number of ids by split, the SHA-256 by split, and the dtype.
    """
    digests = {split: hashlib.sha256() for split in files}
    counts, dtype = dict.fromkeys(files, 0), np.dtype("uint16")
    with ExitStack() as stack:
        opened = {s: stack.enter_context(open(f"{files[s]}{PARTIAL}", "wb")) for s in files}
        for split, piece in pieces:
            dtype = piece.dtype
            ids = _little_endian(piece)
            opened[split].write(ids)
            digests[split].update(ids)
            counts[split] += len(piece)
    return counts, {split: digest.hexdigest() for split, digest in digests.items()}, dtype


def _little_endian(ids: np.ndarray) -> bytes:
    return ids.astype(ids.dtype.newbyteorder("<")).tobytes()


def sha256_of_ids(pieces: SplitIds) -> dict[str, str]:
    """Compute the SHA-256 by split of the files that `write_partial` would write."""
    digests = {split: hashlib.sha256() for split in SPLITS}
    for split, ids in pieces:
        digests[split].update(_little_endian(ids))
    return {split: digest.hexdigest() for split, digest in digests.items()}


def rename_partial(files: dict[str, Path]) -> None:
    """Give the files of `write_partial` their final names."""
    for file in files.values():
        Path(f"{file}{PARTIAL}").replace(file)


def is_prepared(folder: Path) -> bool:
    """Tell whether a folder holds token files and none of them is partial."""
    return any(folder.glob("*.bin")) and not any(folder.glob(f"*{PARTIAL}"))


def holds_dataset(folder: Path) -> bool:
    """Tell whether a folder holds a meta.json, or token files that are not partial."""
    return (folder / META).exists() or any(folder.glob("*.bin"))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's meta.json; without a valid one, no fields."""
    with suppress(OSError, ValueError):
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return meta if isinstance(meta, dict) else {}
    return {}


def open_dataset(folder: Path, data_dir: Path, block_size: int, vocab_size: int = 0) -> Dataset:
    """Open a folder of `jaxgpt prepare` (it has a meta.json), nanoGPT or llm.c.

    `vocab_size` is the vocabulary of files that do not say theirs; 0 means GPT-2's. Raises
    `UserError` for files that are missing, damaged or too short, or differ from meta.json.
    """
    _allow_open_files()
    if any(folder.glob(f"*{PARTIAL}")):
        raise UserError(f"{folder}: preparation was interrupted; expected complete files; {AGAIN}")
    is_ours = (folder / META).exists()
    open_foreign = partial(_open_foreign, folder, data_dir, vocab_size)
    dataset = _open_prepared(folder) if is_ours else open_foreign()
    for tokens in (dataset.train, dataset.val):
        if len(tokens) < block_size + 1:
            problem = f"holds {len(tokens)} tokens, too few for block_size={block_size}"
            advice = f"expected at least {block_size + 1}; try a smaller --block_size"
            raise UserError(f"{tokens.files[0]}: {problem}; {advice}")
    return dataset


def _open_prepared(folder: Path) -> Dataset:
    file = folder / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        dtype, vocab_size = meta["dtype"], int(meta["vocab_size"])
        kind, source = meta["tokenizer"], meta["source"]
        counts = {split: int(meta["counts"][split]) for split in SPLITS}
        sums = dict(meta.get("sha256") or {})
    except OSError as error:
        raise UserError(f"{file}: {reason(error)}; expected a file; {AGAIN}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        expected = "the meta.json of a dataset"
        raise UserError(f"{file}: not valid ({error!r}); expected {expected}; {AGAIN}") from error
    if dtype not in ("uint16", "uint32", "int32"):
        expected = "uint16, uint32 or int32"
        raise UserError(f"{file}: has dtype={dtype!r}; expected {expected}; {AGAIN}")
    splits = {}
    for split in SPLITS:
        has_many = isinstance(sums.get(split), dict) and len(sums[split]) > 0  # a sum per file
        names = list(sums[split]) if has_many else [f"{split}.bin"]
        tokens = TokenSplit([folder / name for name in names], dtype, vocab_size)
        if len(tokens) != counts[split]:
            name = folder / (f"{split}_*.bin" if has_many else names[0])
            problem = f"{len(tokens)} tokens, but {META} says {counts[split]}"
            raise UserError(f"{name}: {problem}; expected complete files; {AGAIN}")
        splits[split] = tokens
    tokenizer = tokenizers.load(folder / tokenizers.FILE, kind)
    fingerprint = {key: meta.get(key) for key in ("vocab_size", "counts", "sha256")}
    return Dataset(splits["train"], splits["val"], vocab_size, tokenizer, source, fingerprint)


def _open_foreign(folder: Path, data_dir: Path, vocab_size: int) -> Dataset:
    """Open files of nanoGPT or llm.c, whose ids are GPT-2's, characters, or below `vocab_size`.

    nanoGPT keeps its characters in a pickle, which is not opened, because it could run any code.
    The characters are read from the input.txt beside it; without one the tokenizer is unknown.
    """
    files = {split: sorted(folder.glob(f"*{split}*.bin")) for split in SPLITS}
    files["val"] = [file for file in files["val"] if file not in files["train"]]  # retrieval_train
    for split in SPLITS:
        if not files[split]:
            problem = f"holds neither {META} nor *{split}*.bin"
            expected = "a folder of jaxgpt prepare, nanoGPT or llm.c"
            raise UserError(f"{folder}: {problem}; expected {expected}; {AGAIN}")
    train, val = splits = [TokenSplit(files[s], "uint16", GPT2_VOCAB, LARGER) for s in SPLITS]
    heads = [_checked_head(split) for split in splits]
    foreign.check_same_range(train.files[0], heads[0], val.files[0], heads[1])
    if vocab_size in PADDED_GPT2:
        vocab_size = 0
    tokenizer, notes = _foreign_tokenizer(folder, data_dir, splits, vocab_size)
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size or GPT2_VOCAB
    train.vocab_size = val.vocab_size = vocab_size
    for split in splits:
        split.read(0, min(len(split), foreign.SAMPLE_IDS))  # fails for an id out of range
    fingerprint = {"vocab_size": vocab_size, "counts": {"train": len(train), "val": len(val)}}
    source = f"token files in {folder}"
    return Dataset(train, val, vocab_size, tokenizer, source, fingerprint, notes=notes)


def _checked_head(tokens: TokenSplit) -> np.ndarray:
    """Return the first ids of a split. Raises `UserError` if a file looks like another dtype."""
    heads = [tokens.head(part, foreign.SAMPLE_IDS) for part in range(len(tokens.files))]
    for file, head in zip(tokens.files, heads, strict=True):
        foreign.check_dtype(file, head)
    return heads[0]


def _foreign_tokenizer(
    folder: Path, data_dir: Path, splits: list[TokenSplit], vocab_size: int
) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """Return the tokenizer of files without a meta.json if it is known, and notes for the log.

    A `vocab_size` above 0 is the user's.
    """
    text, has_pickle = folder / "input.txt", (folder / "meta.pkl").exists()
    if has_pickle and text.exists():
        chars = "".join({char for piece, _ in read_text(text, keep_bom=True) for char in piece})
        return tokenizers.CharTokenizer(chars.replace("\r", "\n")), ()  # as open() does
    assumed = f"vocab_size={vocab_size}" if vocab_size else f"GPT-2's {GPT2_VOCAB:,} ids"
    note = f"{folder}: its vocabulary is not known; assumed: {assumed}"
    if vocab_size:
        return None, (f"{note}; its tokenizer is not known either",)
    if has_pickle:
        size = 1 + max(split.largest_id() for split in splits)
        reason = "meta.pkl is never opened, because a pickle can run code"
        advice = f"try its text as {text}, or --vocab_size={size}"
        return None, (f"{note}, not the {size} that its files use: {reason}; {advice}",)
    note += f"; try --vocab_size=N for another vocabulary, or a {META}"
    with suppress(UserError):  # GPT-2's files are not here and cannot be downloaded
        return tokenizers.gpt2(data_dir), (note,)
    return None, (f"{note}; GPT-2's tokenizer is not in {data_dir / 'gpt2'}",)
