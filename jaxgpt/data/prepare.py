"""`jaxgpt prepare`: a text becomes train.bin, val.bin, tokenizer.json and meta.json."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data import documents, examples
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tasks import TASKS, open_task
from jaxgpt.data.text import CORPORA, get_corpus, read_text
from jaxgpt.data.tokenizer import CharTokenizer, Tokenizer
from jaxgpt.data.tokens import (
    META,
    PARTIAL,
    SPLITS,
    Dataset,
    is_prepared,
    open_dataset,
    write_partial,
)

TRAIN_SHARE = 0.9  # of the characters (of a .jsonl: lines); the rest is for validation: nanoGPT's


def prepare(dataset: str, data_dir: str = "data", tokenizer: str = "", **how: Any) -> Path:
    """Writes `data_dir`/<name>/ for a known corpus or a file, and returns that folder.

    The file is a text, or lines of prompts and completions if its name ends in .jsonl. Sets of
    documents are `documents.prepare`'s, and so is `how`.

    `tokenizer` is char, byte, gpt2, a tokenizer.json, or a known corpus that has one; empty is
    the corpus's own, and char for a file. The file is read as a stream, twice, and may be larger
    than memory. Files take their names only when all of them are whole. Raises `UserError`.
    """
    if (task := Path(dataset).stem) in TASKS:
        raise UserError(
            f"{dataset}: {task} is a task whose problems are made as they are needed, so there is "
            "nothing to prepare; a text needs another name"
        )
    if documents.is_document_set(dataset):
        return documents.prepare(dataset, data_dir, tokenizer or "gpt2", **how)
    for key in filter(how.get, how):
        raise UserError(f"{key}={how[key]!r}: is for documents, and {dataset} is a text")
    if dataset in CORPORA:
        folder = Path(data_dir, dataset)
        text, source = get_corpus(dataset, folder)
        tokenizer = tokenizer or CORPORA[dataset].tokenizer
    elif Path(dataset).is_file():
        text, source = Path(dataset), dataset
        folder = Path(data_dir, text.stem)
    else:
        raise UserError(
            f"{dataset}: neither a text file, a folder nor a corpus jaxgpt knows "
            f"({', '.join([*CORPORA, *documents.HUB])})"
        )
    if folder.is_file():
        raise UserError(f"{folder}: is a file, but its name is that of the folder to be made")
    if tokenizer in CORPORA:
        prepare_if_missing(DataConfig(dataset=tokenizer, data_dir=data_dir))
        tokenizer = str(Path(data_dir, tokenizer, tokenizers.FILE))
    columns = "{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        read = partial(_watched, text, progress)
        survey, encode, unit = _survey, _encode, "characters"
        if text.suffix == ".jsonl":
            survey, encode, unit = examples.survey, examples.encode, "examples"
        chars, length = survey(read("reading"))
        if (train := int(TRAIN_SHARE * length)) in (0, length):
            raise UserError(f"{text}: {length} {unit} are too few to split into train and val")
        encoder = _choose(tokenizer or "char", chars, data_dir)
        encoder.encode("".join(chars))  # or it raises for those it lacks, while nothing is written
        folder.mkdir(parents=True, exist_ok=True)
        ids = encode(read("encoding"), encoder, train)
        meta = _write_ids(folder, encoder, ids) | {"source": source}
    _commit(folder, {tokenizers.FILE: encoder.to_json(), META: json.dumps(meta, indent=1)})
    return folder


def prepare_if_missing(config: DataConfig) -> None:
    """Prepares the dataset of a run if it is a known corpus and not there yet."""
    if config.dataset in CORPORA and not is_prepared(Path(config.data_dir, config.dataset)):
        prepare(config.dataset, config.data_dir)


def find_dataset(config: DataConfig, block_size: int) -> Dataset:
    """The dataset of a run, prepared first if it is a known corpus and not there yet."""
    if config.dataset in TASKS:
        return open_task(config, block_size)
    folder = Path(config.data_dir, config.dataset)
    prepare_if_missing(config)
    if not folder.is_dir():
        raise UserError(
            f"dataset={config.dataset!r}: there is no {folder}; make it with jaxgpt prepare, or "
            f"name a corpus that jaxgpt knows ({', '.join(CORPORA)})"
        )
    return open_dataset(folder, Path(config.data_dir), block_size)


def _watched(file: Path, progress: Progress, description: str) -> Iterator[str]:
    task = progress.add_task(f"{description} {file.name}", total=file.stat().st_size)
    for text, done in read_text(file):
        progress.update(task, completed=done)
        yield text


def _survey(pieces: Iterable[str]) -> tuple[set[str], int]:
    """Which characters there are, and how many in all."""
    chars, length = set(), 0
    for piece in pieces:
        chars.update(piece)
        length += len(piece)
    return chars, length


def _choose(name: str, chars: set[str], data_dir: str) -> Tokenizer:
    if name == "char":
        return CharTokenizer("".join(chars))
    if name == "byte":
        return tokenizers.ByteTokenizer()
    if name == "gpt2":
        return tokenizers.gpt2(data_dir)
    if Path(name).is_file():
        return tokenizers.load(name)
    raise UserError(
        f"tokenizer={name!r}: must be char, byte, gpt2 or a tokenizer.json, or a corpus jaxgpt "
        f"knows ({', '.join(CORPORA)})"
    )


def _split(pieces: Iterable[str], train_chars: int) -> Iterator[tuple[str, str]]:
    """The text in order, as (split, piece): `train_chars` characters of train, then val.

    Pieces of a split end at its `last_break`, so that the ids do not depend on the pieces.
    """
    left, rest = train_chars, ""
    for piece in pieces:
        if left and left <= len(piece):
            yield "train", rest + piece[:left]
            left, rest, piece = 0, "", piece[left:]
        left = max(0, left - len(piece))
        text = rest + piece
        end = tokenizers.last_break(text, 0, len(text))
        yield "train" if left else "val", text[:end]
        rest = text[end:]
    yield "val", rest


def _encode(
    pieces: Iterable[str], encoder: Tokenizer, train_chars: int
) -> Iterator[tuple[str, np.ndarray]]:
    return ((split, encoder.encode(text)) for split, text in _split(pieces, train_chars))


def _write_ids(folder: Path, encoder: Tokenizer, pieces: Iterable[tuple[str, np.ndarray]]) -> dict:
    """Writes ids by split into partial files -> the fields of meta.json that tell of them."""
    files = {split: folder / f"{split}.bin" for split in SPLITS}
    counts, sums, dtype = write_partial(files, pieces)
    return {
        "dtype": dtype.name,
        "vocab_size": encoder.vocab_size,
        "tokenizer": encoder.kind,
        "counts": counts,
        "sha256": sums,
    }


def _commit(folder: Path, texts: dict[str, str]) -> None:
    """Gives every partial file its name, meta.json last."""
    for name, text in texts.items():
        Path(folder, name + PARTIAL).write_text(text, encoding="utf-8")
    for name in (*(f"{split}.bin" for split in SPLITS), *texts):
        Path(folder, name + PARTIAL).replace(folder / name)
