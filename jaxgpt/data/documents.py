"""Documents -> shards of ids: OpenWebText, FineWeb-Edu, one's own parquet or text files.

The source is cut into pieces once and for all. A piece's documents, an end-of-text after each,
become train_<piece>.bin and val_<piece>.bin, and <piece>.json at last says that they are whole.
So any number of processes and machines share the work, are killed and start again, and the files
are always the same.
"""

import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxgpt.config import UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.text import read_text, sha256_of
from jaxgpt.data.tokenizer import BpeTokenizer
from jaxgpt.data.tokens import META, PARTIAL, SPLITS, write_partial

COLUMN = "text"
PIECE_BYTES = 1 << 26  # of local files: about 15 million tokens of plain text
BATCH = 256  # documents encoded in one call
Piece = Callable[[], Iterable[str]]


@dataclass(frozen=True)
class HubSet:
    """A dataset of the Hugging Face hub whose files hold a column `text`."""

    repo: str
    config: str
    revision: str
    """A commit, so that everybody has the same documents."""
    pieces: int


HUB = {
    "openwebtext": HubSet(
        "Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c", 80
    ),
    "fineweb_edu": HubSet(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", 100
    ),
}
VAL_SHARE = {True: 0.0005, False: 0.01}  # of documents, by whether the set is in HUB; nanoGPT's


def is_document_set(dataset: str) -> bool:
    """Whether `dataset` is a set of documents: one of HUB, a folder, or a parquet file."""
    return dataset in HUB or Path(dataset).is_dir() or dataset.endswith(".parquet")


def prepare(
    dataset: str,
    data_dir: str = "data",
    tokenizer: str = "gpt2",
    *,
    val_share: float = 0.0,
    shard: str = "",
    processes: int = 0,
) -> Path:
    """Writes shards of ids and a meta.json to `data_dir`/<name>/, and returns that folder.

    `dataset` is a key of HUB, a folder of .parquet or .txt files, or a parquet file; `tokenizer`
    is gpt2 or a tokenizer.json with an end-of-text. A document is for validation if the hash of
    its text says so, a share of `val_share` (0: VAL_SHARE). `shard` i/n makes every n-th piece;
    meta.json comes when all are there. `processes` use a core each; 0 is all. Raises `UserError`.
    """
    first, step = _parse_shard(shard)
    pieces, source = _open(dataset)
    encoder = _encoder(tokenizer, data_dir)
    path = Path(dataset).resolve()
    name = dataset if dataset in HUB else path.stem if path.is_file() else path.name
    folder = Path(data_dir, name)
    plan = {
        "source": source,
        "pieces": len(pieces),
        "val_share": val_share or VAL_SHARE[dataset in HUB],
        "tokenizer": encoder.kind,
        "tokenizer_sha256": hashlib.sha256(encoder.to_json().encode()).hexdigest(),
        "vocab_size": encoder.vocab_size,
        "end_of_text": encoder.eot,
        "dtype": "uint16" if encoder.vocab_size <= 2**16 else "uint32",
    }
    _begin(folder, plan, encoder)
    mine = dict(list(enumerate(pieces))[first::step])
    _make(folder, plan, mine, min(processes or _cores(), len(mine)))
    _finish(folder, plan)
    return folder


def _encoder(name: str, data_dir: str) -> BpeTokenizer:
    if name == "gpt2":
        return tokenizers.gpt2(data_dir)
    found = tokenizers.load(name) if Path(name).is_file() else None
    if not isinstance(found, BpeTokenizer) or found.eot is None:
        raise UserError(
            f"tokenizer={name!r}: documents need gpt2, or a tokenizer.json that has "
            f"{tokenizers.END_OF_TEXT}"
        )
    return found


def _parse_shard(shard: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"shard={shard!r}: must be i/n, with i from 0 to n - 1")
    return int(found[1]), int(found[2])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- where documents come from ---------------------------------------------------------------


def _open(dataset: str) -> tuple[list[Piece], str]:
    """The pieces of a source, and what it is, for people and to know it again."""
    if dataset in HUB:
        of = HUB[dataset]
        keys = {"name": of.config, "revision": of.revision}
        return _rows(of.repo, of.pieces, keys), f"{of.repo}, {of.config}, revision {of.revision}"
    path = Path(dataset)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = files or sorted(path.rglob("*.txt"))
    if not files:
        raise UserError(f"{path}: holds no .parquet and no .txt files")
    size = sum(file.stat().st_size for file in files)
    source, count = f"{path}, {len(files)} files, {size:,} bytes", -(-size // PIECE_BYTES)
    if files[0].suffix == ".parquet":
        keys = {"data_files": {"train": [str(file) for file in files]}}
        return _rows("parquet", count, keys), source
    cuts = np.linspace(0, len(files), min(count, len(files)) + 1).astype(int)
    return [partial(_texts, files[a:b]) for a, b in pairwise(cuts)], source


def _texts(files: list[Path]) -> Iterator[str]:
    """Each file is a document."""
    for file in files:
        yield "".join(text for text, _ in read_text(file))


def _rows(source: str, count: int, keys: dict[str, Any]) -> list[Piece]:
    """At most `count` pieces, whole row groups each, of what the library `datasets` streams."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{source}: needs datasets; pip install 'jaxgpt[data]'") from error
    try:
        rows: Any = datasets.load_dataset(source, split="train", streaming=True, **keys)
        rows = rows.select_columns([COLUMN]).reshard()
        count = min(count, rows.num_shards)
        return [partial(_column, rows.shard(count, number)) for number in range(count)]
    except Exception as error:  # offline, no such column, no parquet file: of many kinds
        raise UserError(f"{source}: {_first_line(error)}") from error


def _column(rows: Any) -> Iterator[str]:
    try:
        for batch in rows.iter(batch_size=BATCH):
            yield from filter(None, batch[COLUMN])
    except Exception as error:
        raise UserError(f"{_first_line(error)}; the same command again goes on") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


# ---- making pieces ---------------------------------------------------------------------------


def _begin(folder: Path, plan: dict[str, Any], encoder: BpeTokenizer) -> None:
    """Marks the folder as unfinished. Raises `UserError` if it holds pieces of something else."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file, but its name is that of the folder to be made")
    for note in folder.glob("[0-9]*.json"):
        begun = json.loads(note.read_text(encoding="utf-8"))["plan"]
        for key in plan:
            if begun.get(key) != plan[key]:
                said = f"was begun with {key}={begun.get(key)!r}, and this is {plan[key]!r}"
                raise UserError(f"{folder}: {said}; delete it to begin anew")
    if (meta := folder / META).exists() and "pieces" not in json.loads(meta.read_text()):
        raise UserError(f"{folder}: holds another dataset; delete it or take another --data_dir")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / tokenizers.FILE, encoder.to_json())
    (folder / (META + PARTIAL)).write_text(json.dumps(plan, indent=1), encoding="utf-8")


def _make(folder: Path, plan: dict[str, Any], pieces: dict[int, Piece], processes: int) -> None:
    """Makes the pieces that are not whole yet, in processes of their own."""
    began, made = time.perf_counter(), 0
    console = Console(stderr=True)
    spawn = multiprocessing.get_context("spawn")
    with (
        Progress(console=console) as progress,
        ProcessPoolExecutor(max(1, processes), spawn, _start_worker) as pool,
    ):
        task = progress.add_task(f"tokenizing {folder.name}", total=len(pieces))
        waiting = [pool.submit(_make_piece, folder, plan, n, piece) for n, piece in pieces.items()]
        try:
            for done in as_completed(waiting):
                made += done.result()
                rate = made / (time.perf_counter() - began)
                about = f"{folder.name}: {made:,} tokens, {rate:,.0f} tokens/s"
                progress.update(task, advance=1, description=about)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.perf_counter() - began
    console.print(f"{made:,} tokens in {seconds:,.1f} s by {processes} processes", highlight=False)


def _start_worker() -> None:
    """Runs on one core, and not a moment longer than the process that started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


_load = cache(tokenizers.load)  # once a process


def _make_piece(folder: Path, plan: dict[str, Any], number: int, piece: Piece) -> int:
    """Writes a piece unless it is there -> how many tokens it wrote."""
    if _is_whole(folder, number):
        return 0
    encoder: Any = _load(folder / tokenizers.FILE)
    files = {split: folder / _name(split, number) for split in SPLITS}
    texts = iter(piece())
    counts, sums, _ = write_partial(
        files,
        (
            (split, encoder.encode_documents(documents))
            for batch in iter(lambda: list(islice(texts, BATCH)), [])
            for split, documents in _split(batch, plan["val_share"]).items()
        ),
    )
    for file in files.values():
        Path(f"{file}{PARTIAL}").replace(file)
    note = {s: {"tokens": counts[s], "sha256": sums[s]} for s in SPLITS}
    _replace(_note(folder, number), json.dumps(note | {"plan": plan}, indent=1))
    return sum(counts.values())


def _split(documents: list[str], val_share: float) -> dict[str, list[str]]:
    """By a hash of the text, so that copies of a document are on one side."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in documents:
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        number = int.from_bytes(digest[:8], "little")
        parts["val" if number < val_share * 2**64 else "train"].append(text)
    return parts


def _is_whole(folder: Path, number: int) -> bool:
    """Whether a piece's files are as its note says, byte for byte."""
    if not _note(folder, number).exists():
        return False
    note = json.loads(_note(folder, number).read_text(encoding="utf-8"))
    for split in SPLITS:
        file = folder / _name(split, number)
        if not file.is_file() or sha256_of(file) != note[split]["sha256"]:
            return False
    return True


def _name(split: str, number: int) -> str:
    return f"{split}_{number:05d}.bin"


def _note(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


def _replace(file: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, whoever else writes the same."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def _finish(folder: Path, plan: dict[str, Any]) -> None:
    """Writes meta.json, if all pieces are there."""
    notes = [_note(folder, number) for number in range(plan["pieces"])]
    if absent := sum(not note.exists() for note in notes):
        print(f"{absent} of {len(notes)} pieces are still to come, from other shards")
        return
    made = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
    counts = {split: sum(note[split]["tokens"] for note in made) for split in SPLITS}
    for split in SPLITS:
        if not counts[split]:
            raise UserError(
                f"val_share={plan['val_share']}: leaves no document for {split}; delete {folder} "
                "and begin anew with another one"
            )
    sums = {
        split: {
            _name(split, number): note[split]["sha256"]
            for number, note in enumerate(made)
            if note[split]["tokens"]
        }
        for split in SPLITS
    }
    _replace(folder / META, json.dumps(plan | {"counts": counts, "sha256": sums}, indent=1))
    (folder / (META + PARTIAL)).unlink(missing_ok=True)
