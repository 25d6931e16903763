"""Tokenize sets of documents: OpenWebText, FineWeb-Edu, your own parquet or text files.

The source alone decides how it is cut into pieces. The documents of a piece, each followed by an
end-of-text, become train_<piece>.bin and val_<piece>.bin. <piece>.json is written last and says
that both are complete. Processes and machines can therefore share the work, and continue after an
interruption, and the files are always the same.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice, pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxgpt.config import DATASET_NAME, UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.text import read_text
from jaxgpt.data.tokenizer import BpeTokenizer
from jaxgpt.data.tokens import (
    META,
    PARTIAL,
    SPLITS,
    SplitIds,
    holds_dataset,
    read_meta,
    rename_partial,
    write_partial,
)
from jaxgpt.runtime.files import atomic_write, cores, import_extra, make_folder, sha256_of

COLUMN = "text"
NOTES = "[0-9]" * 5 + ".json"  # the notes of pieces; the documents may lie in the same folder
PIECE_BYTES = 1 << 26  # of local files: about 15 million tokens of plain text
BATCH = 256  # documents encoded in one call
NO_TIKTOKEN = (
    "tiktoken is not installed, so the library tokenizers encodes the documents, which is slower; "
    "try pip install 'jaxgpt[data]'"
)
Piece = Callable[[], Iterable[str]]
_load_encoder = cache(tokenizers.load)  # once in each worker


class HubSet(NamedTuple):
    """A dataset of the Hugging Face hub whose files have a column `text`."""

    repo: str
    config: str
    revision: str  # a commit, so that everybody gets the same documents
    pieces: int


HUB = {
    "openwebtext": HubSet(
        "Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c", 80
    ),
    "fineweb_edu": HubSet(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", 100
    ),
}
HUB_VAL_FRACTION = 0.0005  # of documents, as in nanoGPT
VAL_FRACTION = 0.01  # of documents in local files


def prepare(
    dataset: str, data_dir: str, tokenizer: str, *,
    name="", overwrite=False, val_share=0.0, shard="", processes=0,
) -> Path:  # fmt: skip
    """Write shards of ids and a meta.json to `data_dir`/<name>/, and return that folder.

    `dataset` is a key of HUB, a folder of .parquet or .txt files, or a parquet file. `tokenizer`
    is gpt2 or a tokenizer.json with an end-of-text. A hash of each text selects the fraction
    `val_share` for validation; 0 means HUB_VAL_FRACTION or VAL_FRACTION. `shard` i/n makes every
    n-th piece; meta.json is written once all pieces exist. `processes` of 0 means one per core.
    A dataset that was made otherwise is deleted only with `overwrite`. Raises `UserError`.
    """
    wanted = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    if wanted is None or int(wanted[1]) >= int(wanted[2]):
        expected = "i/n with i from 0 to n - 1"
        raise UserError(f"shard={shard!r}: not a share; expected {expected}; try --shard=0/2")
    pieces, source = _open(dataset)
    encoder = tokenizers.find(tokenizer, data_dir)
    if not isinstance(encoder, BpeTokenizer) or encoder.eot is None:
        expected = f"gpt2, or a tokenizer.json that has {tokenizers.END_OF_TEXT}"
        raise UserError(f"tokenizer={tokenizer!r}: not for documents; expected {expected}")
    path = Path(dataset).resolve()
    name = name or (path.stem if path.is_file() else path.name)
    check_name(name, dataset)
    folder = Path(data_dir, name)
    manifest = {
        "source": source,
        "pieces": len(pieces),
        "val_share": val_share or (HUB_VAL_FRACTION if dataset in HUB else VAL_FRACTION),
        "tokenizer": encoder.kind,
        "tokenizer_sha256": hashlib.sha256(encoder.to_json().encode()).hexdigest(),
        "vocab_size": encoder.vocab_size,
        "end_of_text": encoder.eot,
        "dtype": tokenizers.id_dtype(encoder.vocab_size).name,
    }
    _mark_unfinished(folder, manifest, encoder, overwrite)
    if encoder.kind == "gpt2" and find_spec("tiktoken") is None:
        print(NO_TIKTOKEN, file=sys.stderr)
    numbers = range(int(wanted[1]), len(pieces), int(wanted[2]))
    own_pieces = {number: pieces[number] for number in numbers}
    _make_pieces(folder, manifest, own_pieces, min(processes or cores(), len(own_pieces)))
    _finish(folder, manifest)
    return folder


def check_name(name: str, source: str) -> None:
    """Raise `UserError` if a file's or a folder's name cannot be the name of a dataset."""
    if name in DATASET_NAME:
        return
    proposed = re.sub(r"[^\w.+-]+", "_", name).strip("_.+-") or "text"
    problem = f"{name!r} cannot be the name of a dataset"
    expected = "letters, digits and . + - _"
    raise UserError(f"{source}: {problem}; expected {expected}; try --name={proposed}")


def _open(dataset: str) -> tuple[list[Piece], str]:
    """Return the pieces of a source, and the description that identifies the source."""
    if dataset in HUB:
        hub = HUB[dataset]
        keys = {"name": hub.config, "revision": hub.revision}
        source = f"{hub.repo}, {hub.config}, revision {hub.revision}"
        return _cut_rows(dataset, hub.repo, hub.pieces, keys), source
    path = Path(dataset)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    texts = sorted(path.rglob("*.txt"))
    if files and texts:
        note = "are left out, because it also holds .parquet files"
        print(f"{path}: its {len(texts)} .txt files {note}", file=sys.stderr)
    files = files or texts
    if not files:
        problem = "holds no documents" if path.exists() else "no such file"
        raise UserError(f"{path}: {problem}; expected a folder of .parquet or .txt files")
    total_bytes = sum(file.stat().st_size for file in files)
    if not total_bytes:
        raise UserError(f"{path}: its files are empty; expected documents in them")
    digest = _sha256_of_all(files)[:16]
    source = f"{path}, {len(files)} files, {total_bytes:,} bytes, SHA-256 {digest}"
    count = math.ceil(total_bytes / PIECE_BYTES)
    if files[0].suffix == ".parquet":
        keys = {"data_files": {"train": [str(file) for file in files]}}
        return _cut_rows(dataset, "parquet", count, keys), source
    cuts = np.linspace(0, len(files), min(count, len(files)) + 1).astype(int)
    return [partial(_read_texts, files[start:stop]) for start, stop in pairwise(cuts)], source


def _sha256_of_all(files: list[Path]) -> str:
    """Compute the SHA-256 of the digests of files, which tells whether one was edited."""
    digests = "".join(sha256_of(file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()


def _read_texts(files: list[Path]) -> Iterator[str]:
    """Yield the text of each file as a document."""
    for file in files:
        yield "".join(text for text, _ in read_text(file))


def _cut_rows(dataset: str, loader: str, count: int, keys: dict[str, Any]) -> list[Piece]:
    """Cut what the library `datasets` streams into at most `count` pieces of whole row groups."""
    datasets = import_extra("datasets", dataset, "data")
    try:
        rows: Any = datasets.load_dataset(loader, split="train", streaming=True, **keys)
        rows = rows.select_columns([COLUMN]).reshard()
        count = min(count, rows.num_shards)
        return [partial(_read_rows, dataset, rows.shard(count, n)) for n in range(count)]
    except Exception as error:  # offline, no such column, no parquet file: many types
        raise UserError(
            f"{dataset}: cannot be opened ({_first_line(error)}); "
            f"expected parquet files with a column {COLUMN}, here or on a hub that is online"
        ) from error


def _read_rows(dataset: str, rows: Any) -> Iterator[str]:
    """Yield the documents in these rows that are not empty."""
    try:
        for batch in rows.iter(batch_size=BATCH):
            for text in filter(None, batch[COLUMN]):
                if not isinstance(text, str):
                    problem = f"its column {COLUMN} holds {type(text).__name__}"
                    raise UserError(f"{dataset}: {problem}; expected texts")
                yield text
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{dataset}: reading failed ({_first_line(error)}); "
            "try the same command again, which keeps the finished pieces"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _made_otherwise(folder: Path, manifest: dict[str, Any]) -> str:
    """Say how the dataset in a folder differs from this manifest; empty if it does not."""
    manifests = _read_plans(folder)
    is_begun = (folder / (META + PARTIAL)).exists()
    if holds_dataset(folder) and not is_begun:
        meta = read_meta(folder)
        if "pieces" not in meta:
            return "holds another dataset"
        manifests.append(meta)
    for begun in manifests:
        for key, value in manifest.items():
            if begun.get(key) != value:
                return f"was begun with {key}={begun.get(key)!r}, but now {key}={value!r}"
    return ""


def _read_plans(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests in the notes. Raises `UserError` for another file of such a name."""
    plans = []
    for file in folder.glob(NOTES):
        try:
            plans.append(_read_json(file)["plan"])
        except (ValueError, KeyError, TypeError) as error:
            problem = "its name is that of a file which jaxgpt writes; expected another name"
            raise UserError(f"{file}: {problem}; try another --name for the dataset") from error
    return plans


def _delete_dataset(folder: Path) -> None:
    """Delete the files of a dataset, but no other files in its folder, such as the documents."""
    for pattern in ("train*.bin*", "val*.bin*", NOTES, f"{META}*", tokenizers.FILE):
        for file in folder.glob(pattern):
            file.unlink()


def delete_pieces(folder: Path) -> None:
    """Delete the pieces of a dataset that another one has replaced, and their notes."""
    for note in folder.glob(NOTES):
        with suppress(ValueError, KeyError, TypeError):  # another program's file
            _ = _read_json(note)["plan"]
            files, _ = _piece_files(folder, int(note.stem))
            for file in (*files.values(), note):
                file.unlink(missing_ok=True)


def _mark_unfinished(
    folder: Path, manifest: dict[str, Any], encoder: BpeTokenizer, overwrite: bool
) -> None:
    """Mark the folder as unfinished. Raises `UserError` if it holds another dataset.

    With `overwrite`, the other dataset is deleted instead.
    """
    problem = _made_otherwise(folder, manifest)
    if problem and overwrite:
        _delete_dataset(folder)
    elif problem:
        advice = "expected a new folder; try another --name, or --overwrite to replace it"
        raise UserError(f"{folder}: {problem}; {advice}")
    make_folder(folder, str(folder), "--data_dir")
    atomic_write(folder / tokenizers.FILE, encoder.to_json(), shared=True)
    (folder / (META + PARTIAL)).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _make_pieces(folder: Path, manifest: dict, pieces: dict[int, Piece], processes: int) -> None:
    """Make the pieces that are not complete yet, in worker processes."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, processes), spawn, _start_worker)
    num_tokens, start = 0, time.perf_counter()
    with Progress(console=Console(stderr=True, force_jupyter=False)) as progress, pool:
        task = progress.add_task(f"tokenizing {folder.name}", total=len(pieces))
        jobs = [pool.submit(_make_piece, folder, manifest, n, piece) for n, piece in pieces.items()]
        try:
            for job in as_completed(jobs):
                num_tokens += job.result()
                rate = num_tokens / (time.perf_counter() - start)
                description = f"{folder.name}: {num_tokens:,} tokens, {rate:,.0f} tokens/s"
                progress.update(task, advance=1, description=description)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.perf_counter() - start
    line = f"{num_tokens:,} tokens in {seconds:,.1f} s with {processes} processes"
    print(line, file=sys.stderr)


def _start_worker() -> None:
    """Limit a worker to one core, and end the worker when its parent ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os._exit(1)


def _make_piece(folder: Path, manifest: dict[str, Any], number: int, piece: Piece) -> int:
    """Write a piece unless its files are as its note says; return how many tokens it wrote."""
    files, note = _piece_files(folder, number)
    if note.exists():
        noted = _read_json(note)
        if all(f.is_file() and sha256_of(f) == noted[s]["sha256"] for s, f in files.items()):
            return 0
    encoder: Any = _load_encoder(folder / tokenizers.FILE, manifest["tokenizer"])
    counts, sums, _ = write_partial(files, _encode(piece(), encoder, manifest["val_share"]))
    rename_partial(files)
    noted = {s: {"tokens": counts[s], "sha256": sums[s]} for s in SPLITS} | {"plan": manifest}
    atomic_write(note, json.dumps(noted, indent=1))
    return sum(counts.values())


def _encode(texts: Iterable[str], encoder: BpeTokenizer, val_share: float) -> SplitIds:
    """Yield the ids of documents by split. Equal documents are in the same split."""
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        documents: dict[str, list[str]] = {split: [] for split in SPLITS}
        for text in batch:
            digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
            is_val = int.from_bytes(digest[:8], "little") < val_share * 2**64
            documents["val" if is_val else "train"].append(text)
        for split in SPLITS:
            yield split, encoder.encode_documents(documents[split])


def _piece_files(folder: Path, number: int) -> tuple[dict[str, Path], Path]:
    """Return the token files of a piece by split, and its note."""
    files = {split: folder / f"{split}_{number:05d}.bin" for split in SPLITS}
    return files, folder / f"{number:05d}.json"


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Write meta.json if all pieces exist. Raises `UserError` if a split has no document."""
    pieces = [_piece_files(folder, number) for number in range(manifest["pieces"])]
    finished = [(files, _read_json(note)) for files, note in pieces if note.exists()]
    missing = len(pieces) - len(finished)
    if missing:
        print(f"{folder}: {missing} of {len(pieces)} pieces are missing; run the other shards")
        return
    counts, sums = {}, {}
    for split in SPLITS:
        parts = {files[split].name: note[split] for files, note in finished}
        counts[split] = sum(part["tokens"] for part in parts.values())
        sums[split] = {name: part["sha256"] for name, part in parts.items() if part["tokens"]}
        if not counts[split]:
            problem = f"leaves no document for {split}"
            advice = "try another --val_share, with --overwrite"
            raise UserError(f"val_share={manifest['val_share']}: {problem}; {advice}")
    meta = manifest | {"counts": counts, "sha256": sums}
    atomic_write(folder / META, json.dumps(meta, indent=1), shared=True)
    for name in (META, "train.bin", "val.bin"):  # of this set, or of a text that was interrupted
        (folder / (name + PARTIAL)).unlink(missing_ok=True)
