"""Prepare a dataset: turn a text into train.bin, val.bin, tokenizer.json and meta.json."""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data import documents, tokens
from jaxgpt.data import shards as shard_sets
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.examples import encode_examples, end_of_completion, scan_examples
from jaxgpt.data.shards import SHARD_SETS
from jaxgpt.data.tasks import TASKS, open_task
from jaxgpt.data.text import CORPORA, FALLBACK, get_corpus, read_text
from jaxgpt.data.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer
from jaxgpt.data.tokens import Dataset, SplitIds
from jaxgpt.runtime.bucket import local_data_dir
from jaxgpt.runtime.files import atomic_write, delete, make_folder, only_writer, sha256_of

TRAIN_FRACTION = 0.9  # of the characters or examples, as in nanoGPT


def prepare(
    dataset: str, data_dir: str = "data", tokenizer: str = "", *, name: str = "",
    overwrite: bool = False, shards: int = 0, **options: Any,
) -> Path:  # fmt: skip
    """Write `data_dir`/<name>/ for a known corpus or a file, and return that folder.

    The file is a text, or lines of prompts and completions if its name ends in .jsonl. It may be
    larger than memory. `tokenizer` is char, byte, gpt2, a tokenizer.json, or a known corpus; empty
    means the corpus's own, and char for a file. An empty `name` means that of the corpus or file.
    A dataset that was made otherwise is replaced only with `overwrite`. `options` are for
    `documents.prepare`, which handles sets of documents, and `shards` is for `shards.prepare`.
    Raises `UserError`.
    """
    path = Path(dataset)
    if (name or path.stem) in TASKS:
        problem = "is the name of a task, which needs no preparation"
        advice = f"try --dataset={name or path.stem} in training, or another --name for a text"
        raise UserError(f"{name or dataset}: {problem}; {advice}")
    if dataset in SHARD_SETS:
        _reject_options(options, f"{dataset} is already tokenized")
        _check_shard_options(dataset, tokenizer, overwrite)
        return shard_sets.prepare(dataset, data_dir, shards, name)
    if shards:
        problem = f"applies to {', '.join(SHARD_SETS)}, which is downloaded in shards"
        advice = "try without --shards, or --shard=i/n to divide documents among machines"
        raise UserError(f"shards={shards}: {problem}; {advice}")
    is_source = path.is_dir() or path.suffix == ".parquet"
    if dataset in documents.HUB or (is_source and dataset not in CORPORA):
        options |= {"name": name, "overwrite": overwrite}
        return documents.prepare(dataset, data_dir, tokenizer or "gpt2", **options)
    _reject_options(options, f"{dataset} is a text")
    if path.is_file():
        documents.check_name(name or path.stem, dataset)
    folder = Path(data_dir, name or path.stem)
    if dataset in CORPORA:
        _prepare_corpus(dataset, folder, tokenizer, data_dir, overwrite)
    elif path.is_file():
        _write_dataset(path, folder, {"source": dataset}, tokenizer or "char", data_dir, overwrite)
    else:
        problem = "neither a text file, a folder nor a known corpus"
        expected = ", ".join([*CORPORA, *documents.HUB, *SHARD_SETS])
        raise UserError(f"{dataset}: {problem}; expected a path, or one of {expected}")
    return folder


def _check_shard_options(dataset: str, tokenizer: str, overwrite: bool) -> None:
    """Raise `UserError` for an option that does not apply to shards."""
    if tokenizer not in ("", "gpt2"):
        problem = f"{dataset} is already tokenized"
        raise UserError(f"tokenizer={tokenizer!r}: {problem}; expected gpt2")
    if overwrite:
        problem = f"{dataset} never replaces a dataset"
        raise UserError(f"overwrite=True: {problem}; try without --overwrite, or another --name")


def _reject_options(options: dict[str, Any], reason: str) -> None:
    """Raise `UserError` for an option of `documents.prepare` that is given."""
    for key, value in options.items():
        if value:
            problem = f"applies to documents, and {reason}"
            raise UserError(f"{key}={value!r}: {problem}; try without --{key}")


def _prepare_corpus(
    corpus: str, folder: Path, tokenizer: str, data_dir: str, overwrite: bool
) -> None:
    """Write the dataset of a known corpus, and record which text it was made from."""
    home = Path(data_dir, corpus)  # the folder of the text
    is_replaced = text_was_replaced(folder)
    file, source = get_corpus(corpus, home)
    made_from, before = sha256_of(file), tokens.read_meta(folder)
    if made_from == before.get("text_sha256"):
        source = before["source"]  # which says more than the path of the text
    meta = {"source": source, "text_sha256": made_from}
    tokenizer = tokenizer or CORPORA[corpus].tokenizer
    _write_dataset(file, folder, meta, tokenizer, data_dir, overwrite or is_replaced)


def text_was_replaced(folder: Path) -> bool:
    """Tell whether the ids are of the fallback text, and its input.txt is now another text."""
    meta, file = tokens.read_meta(folder), folder / "input.txt"
    is_fallback = FALLBACK in str(meta.get("source")) and file.is_file()
    return is_fallback and sha256_of(file) != meta.get("text_sha256")


def prepare_if_missing(config: DataConfig, *, is_fresh: bool = False) -> None:
    """Prepare the dataset of a run if it is a known corpus and not prepared yet.

    A run that `is_fresh` also prepares the fallback text's dataset again if its text was replaced.
    The old dataset is kept under another name, because other runs may have to resume with it.
    """
    if config.dataset not in CORPORA:
        return
    data_dir = local_data_dir(config.data_dir, config.dataset)
    folder = data_dir / config.dataset
    if _is_up_to_date(config.dataset, folder, is_fresh):
        return
    make_folder(folder, str(folder), "--data_dir")
    with only_writer(folder):  # two runs may start at the same time
        if not tokens.is_prepared(folder):
            prepare(config.dataset, str(data_dir))
        elif not _is_up_to_date(config.dataset, folder, is_fresh):
            _replace_fallback(config.dataset, folder)


def _is_up_to_date(corpus: str, folder: Path, is_fresh: bool) -> bool:
    """Tell whether a corpus is prepared, for a run that `is_fresh` from its present text."""
    return tokens.is_prepared(folder) and not (is_fresh and text_was_replaced(folder))


def _replace_fallback(corpus: str, folder: Path) -> None:
    """Prepare a corpus from the text beside its token files, and keep a copy of the old folder."""
    kept = folder.with_name(f"{folder.name}_fallback")
    print(f"{folder}: now made from the input.txt in it; {kept} is the old one", file=sys.stderr)
    shutil.copytree(folder, kept, ignore=lambda *_: {"input.txt"}, dirs_exist_ok=True)
    kind = tokens.read_meta(folder)["tokenizer"]
    tokenizer = str(folder / tokenizers.FILE) if kind == "bpe" else kind
    prepare(corpus, str(folder.parent), tokenizer)


def find_dataset(config: DataConfig, block_size: int, vocab_size: int = 0) -> Dataset:
    """Open the dataset of a run. A known corpus is prepared first if it is missing.

    `vocab_size` is for token files that do not say how many ids there are; 0 means GPT-2's.
    """
    if config.dataset in TASKS:
        return open_task(config, block_size)
    prepare_if_missing(config)
    data_dir = local_data_dir(config.data_dir, config.dataset)
    folder = data_dir / config.dataset
    if not folder.is_dir():
        expected = f"a prepared dataset, or one of {', '.join([*CORPORA, *TASKS])}"
        is_known = config.dataset in (*documents.HUB, *SHARD_SETS)
        advice = f"try jaxgpt prepare {folder.name}{'' if is_known else '.txt'}"
        raise UserError(f"dataset={config.dataset!r}: no {folder}; expected {expected}; {advice}")
    found = tokens.open_dataset(folder, data_dir, block_size, vocab_size)
    if config.dataset in CORPORA and text_was_replaced(folder):
        note = f"{folder}: its token files are not of the input.txt in it, and are kept, because "
        note += "the run resumes with them; a new run takes the text"
        return replace(found, notes=(*found.notes, note))
    return found


def _write_dataset(
    file: Path, folder: Path, origin: dict[str, str], tokenizer: str, data_dir: str, overwrite: bool
) -> None:
    """Encode a file in two passes: the first collects its characters, the second writes ids.

    `origin` are fields of meta.json. Raises `UserError` if the folder holds another dataset.
    """
    if tokenizer in CORPORA:
        prepare_if_missing(DataConfig(dataset=tokenizer, data_dir=data_dir))
        tokenizer = str(Path(data_dir, tokenizer, tokenizers.FILE))
    if file.suffix == ".jsonl":
        scan, encode, unit = scan_examples, encode_examples, "examples"
    else:
        scan, encode, unit = scan_chars, encode_text, "characters"
    columns = "{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True, force_jupyter=False)) as progress:
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
        # both fail before anything is written, for missing characters and a missing end
        encoder.encode(text_chars)
        if encode is encode_examples:
            end_of_completion(encoder)
        make_folder(folder, str(folder), "--data_dir")
        if not overwrite and tokens.holds_dataset(folder):
            ids = encode(_read(file, progress, "comparing"), encoder, train)
            _check_same_dataset(folder, encoder, ids)
        files = {split: folder / f"{split}.bin" for split in tokens.SPLITS}
        pieces = encode(_read(file, progress, "encoding"), encoder, train)
        counts, sums, dtype = tokens.write_partial(files, pieces)
    ids = {"dtype": dtype.name, "vocab_size": encoder.vocab_size, "tokenizer": encoder.kind}
    meta = ids | {"counts": counts, "sha256": sums} | origin
    atomic_write(folder / tokenizers.FILE, encoder.to_json())
    atomic_write(folder / tokens.META, json.dumps(meta, indent=1))
    tokens.rename_partial(files)  # last, because partial files mark the folder as unfinished
    for left in folder.glob(f"*{tokens.PARTIAL}"):  # of a set of documents that was interrupted
        delete(left)
    documents.delete_pieces(folder)


def _check_same_dataset(folder: Path, encoder: Tokenizer, ids: SplitIds) -> None:
    """Raise `UserError` unless a folder holds these ids, made with this tokenizer."""
    meta, suffix = tokens.read_meta(folder), "2"
    if not meta:
        holds = "token files that jaxgpt prepare did not make"
    elif not _was_made_with(encoder, folder, meta):
        kind = meta.get("tokenizer")
        holds = f"a dataset of another tokenizer ({kind}, {meta.get('vocab_size')} ids)"
        suffix = suffix if kind == encoder.kind else encoder.kind
    elif meta.get("sha256") != tokens.sha256_of_ids(ids):
        holds = f"a dataset of another text ({meta.get('source')})"
    else:
        return
    advice = f"try --name={folder.name}_{suffix}, or --overwrite to replace it"
    raise UserError(f"{folder}: holds {holds}; expected a new folder; {advice}")


def _was_made_with(encoder: Tokenizer, folder: Path, meta: dict[str, Any]) -> bool:
    """Tell whether a dataset's tokenizer is `encoder`, by meta.json if its file is damaged."""
    with suppress(UserError):
        return tokenizers.same_ids(encoder, tokenizers.load(folder / tokenizers.FILE))
    return (meta.get("tokenizer"), meta.get("vocab_size")) == (encoder.kind, encoder.vocab_size)


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

    With GPT-2's encoding the ids do not depend on `pieces`, because each text ends at its
    `last_break`.
    """
    left, rest = train_chars, ""  # characters left for train; text that is not yet encoded
    joins_characters = isinstance(encoder, BpeTokenizer)
    for piece in pieces:
        if left and left <= len(piece):
            yield "train", encoder.encode(rest + piece[:left])
            left, rest, piece = 0, "", piece[left:]
        left = max(0, left - len(piece))
        text = rest + piece
        end = tokenizers.last_break(text, 0, len(text)) if joins_characters else len(text)
        yield "train" if left else "val", encoder.encode(text[:end])
        rest = text[end:]
    yield "val", encoder.encode(rest)
