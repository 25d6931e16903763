"""Prepare a dataset: turn a text into train.bin, val.bin, tokenizer.json and meta.json."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data import documents, tokens
from jaxgpt.data import shards as shard_sets
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.examples import encode_examples, scan_examples
from jaxgpt.data.shards import SHARD_SETS
from jaxgpt.data.tasks import TASKS, open_task
from jaxgpt.data.text import CORPORA, get_corpus, read_text
from jaxgpt.data.tokenizer import CharTokenizer, Tokenizer
from jaxgpt.data.tokens import Dataset, SplitIds
from jaxgpt.runtime.files import atomic_write, make_folder

TRAIN_FRACTION = 0.9  # of the characters or examples, as in nanoGPT


def prepare(
    dataset: str, data_dir: str = "data", tokenizer: str = "", *, shards: int = 0, **options: Any
) -> Path:
    """Write `data_dir`/<name>/ for a known corpus or a file, and return that folder.

    The file is a text, or lines of prompts and completions if its name ends in .jsonl. It may be
    larger than memory. `tokenizer` is char, byte, gpt2, a tokenizer.json, or a known corpus; empty
    means the corpus's own, and char for a file. `options` are for `documents.prepare`, which
    handles sets of documents, and `shards` is for `shards.prepare`. Raises `UserError`.
    """
    path = Path(dataset)
    if path.stem in TASKS:
        problem = "is the name of a task, which needs no preparation"
        advice = f"try --dataset={path.stem} in training, or another name for a text"
        raise UserError(f"{dataset}: {problem}; {advice}")
    if dataset in SHARD_SETS:
        _reject_options(options, f"{dataset} is already tokenized")
        if tokenizer not in ("", "gpt2"):
            problem = f"{dataset} is already tokenized"
            raise UserError(f"tokenizer={tokenizer!r}: {problem}; expected gpt2")
        return shard_sets.prepare(dataset, data_dir, shards)
    if shards:
        problem = f"applies to {', '.join(SHARD_SETS)}, which is downloaded in shards"
        advice = "try without --shards, or --shard=i/n to divide documents among machines"
        raise UserError(f"shards={shards}: {problem}; {advice}")
    if dataset in documents.HUB or path.is_dir() or path.suffix == ".parquet":
        return documents.prepare(dataset, data_dir, tokenizer or "gpt2", **options)
    _reject_options(options, f"{dataset} is a text")
    if dataset not in CORPORA and not path.is_file():
        problem = "neither a text file, a folder nor a known corpus"
        expected = ", ".join([*CORPORA, *documents.HUB, *SHARD_SETS])
        raise UserError(f"{dataset}: {problem}; expected a path, or one of {expected}")
    folder, source = Path(data_dir, path.stem), dataset
    if dataset in CORPORA:
        path, source = get_corpus(dataset, folder)
        tokenizer = tokenizer or CORPORA[dataset].tokenizer
    _write_dataset(path, folder, source, tokenizer or "char", data_dir)
    return folder


def _reject_options(options: dict[str, Any], reason: str) -> None:
    """Raise `UserError` for an option of `documents.prepare` that is given."""
    for key, value in options.items():
        if value:
            problem = f"applies to documents, and {reason}"
            raise UserError(f"{key}={value!r}: {problem}; try without --{key}")


def prepare_if_missing(config: DataConfig) -> None:
    """Prepare the dataset of a run if it is a known corpus and not prepared yet."""
    if config.dataset in CORPORA and not tokens.is_prepared(Path(config.data_dir, config.dataset)):
        prepare(config.dataset, config.data_dir)


def find_dataset(config: DataConfig, block_size: int, vocab_size: int = 0) -> Dataset:
    """Open the dataset of a run. A known corpus is prepared first if it is missing.

    `vocab_size` is for token files that do not say how many ids there are; 0 means GPT-2's.
    """
    if config.dataset in TASKS:
        return open_task(config, block_size)
    prepare_if_missing(config)
    folder = Path(config.data_dir, config.dataset)
    if not folder.is_dir():
        expected = f"a prepared dataset, or one of {', '.join([*CORPORA, *TASKS])}"
        is_known = config.dataset in (*documents.HUB, *SHARD_SETS)
        advice = f"try jaxgpt prepare {folder.name}{'' if is_known else '.txt'}"
        raise UserError(f"dataset={config.dataset!r}: no {folder}; expected {expected}; {advice}")
    return tokens.open_dataset(folder, Path(config.data_dir), block_size, vocab_size)


def _write_dataset(file: Path, folder: Path, source: str, tokenizer: str, data_dir: str) -> None:
    """Encode a file in two passes: the first collects its characters, the second writes ids."""
    if tokenizer in CORPORA:
        prepare_if_missing(DataConfig(dataset=tokenizer, data_dir=data_dir))
        tokenizer = str(Path(data_dir, tokenizer, tokenizers.FILE))
    if file.suffix == ".jsonl":
        scan, encode, unit = scan_examples, encode_examples, "examples"
    else:
        scan, encode, unit = scan_chars, encode_text, "characters"
    columns = "{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        chars, length = scan(_read(file, progress, "reading"))
        train = int(TRAIN_FRACTION * length)
        if train in (0, length):
            problem = f"too few {unit} for train and val ({length})"
            raise UserError(f"{file}: {problem}; expected at least 2")
        text_chars = "".join(chars)
        is_char = tokenizer == "char"
        encoder = CharTokenizer(text_chars) if is_char else tokenizers.find(tokenizer, data_dir)
        if encoder is None:
            kinds = f"char, byte, gpt2, a tokenizer.json, or one of {', '.join(CORPORA)}"
            raise UserError(f"tokenizer={tokenizer!r}: unknown tokenizer; expected {kinds}")
        encoder.encode(text_chars)  # fails for missing characters before anything is written
        make_folder(folder, str(folder), "--data_dir")
        files = {split: folder / f"{split}.bin" for split in tokens.SPLITS}
        pieces = encode(_read(file, progress, "encoding"), encoder, train)
        counts, sums, dtype = tokens.write_partial(files, pieces)
    ids = {"dtype": dtype.name, "vocab_size": encoder.vocab_size, "tokenizer": encoder.kind}
    meta = ids | {"counts": counts, "sha256": sums, "source": source}
    atomic_write(folder / tokenizers.FILE, encoder.to_json())
    atomic_write(folder / tokens.META, json.dumps(meta, indent=1))
    tokens.rename_partial(files)  # last, because partial files mark the folder as unfinished


def _read(file: Path, progress: Progress, description: str) -> Iterator[str]:
    task = progress.add_task(f"{description} {file.name}", total=file.stat().st_size)
    for text, done in read_text(file):
        progress.update(task, completed=done)
        yield text


def scan_chars(pieces: Iterable[str]) -> tuple[set[str], int]:
    """Collect the characters of a text, and count its length."""
    chars, length = set(), 0
    for piece in pieces:
        chars.update(piece)
        length += len(piece)
    return chars, length


def encode_text(pieces: Iterable[str], encoder: Tokenizer, train_chars: int) -> SplitIds:
    """Yield splits and their ids in order: the first `train_chars` characters are train.

    The text is encoded up to its `last_break`, so the ids do not depend on `pieces`.
    """
    left, rest = train_chars, ""
    for piece in pieces:
        if left and left <= len(piece):
            yield "train", encoder.encode(rest + piece[:left])
            left, rest, piece = 0, "", piece[left:]
        left = max(0, left - len(piece))
        text = rest + piece
        end = tokenizers.last_break(text, 0, len(text))
        yield "train" if left else "val", encoder.encode(text[:end])
        rest = text[end:]
    yield "val", encoder.encode(rest)
