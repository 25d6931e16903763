"""Documents -> shards of ids: OpenWebText, FineWeb-Edu, your own parquet or text files.

The source is cut into pieces that depend on it alone. The documents of a piece, with an end-of-text
after each, become train_<piece>.bin and val_<piece>.bin; <piece>.json then says that both are
whole. So processes and machines can share the work and be restarted, and the files are the same.
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
from functools import cache, partial
from itertools import islice, pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxgpt.config import UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.text import read_text
from jaxgpt.data.tokenizer import BpeTokenizer
from jaxgpt.data.tokens import META, PARTIAL, SPLITS, SplitIds, name_partial, write_partial
from jaxgpt.runtime.files import atomic_write, cores, sha256_of

COLUMN = "text"
PIECE_BYTES = 1 << 26  # of local files: about 15 million tokens of plain text
BATCH = 256  # documents encoded in one call
Piece = Callable[[], Iterable[str]]
LOAD_ONCE = cache(tokenizers.load)  # in each process


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
VAL_FRACTION = {True: 0.0005, False: 0.01}  # of documents, by whether HUB has the set; nanoGPT's


def prepare(
    dataset: str, data_dir: str, tokenizer: str, *, val_share=0.0, shard="", processes=0
) -> Path:
    """Writes shards of ids and a meta.json to `data_dir`/<name>/, and returns that folder.

    `dataset` is a key of HUB, a folder of .parquet or .txt files, or a parquet file; `tokenizer`
    is gpt2 or a tokenizer.json with an end-of-text. A hash of its text decides whether a document
    is in the fraction `val_share` for validation (0: VAL_FRACTION). `shard` i/n makes every n-th
    piece; meta.json follows when all pieces are there. `processes` take a core each; 0 takes all.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    first, count = map(int, found.groups()) if found else (0, 0)
    if first >= count:
        raise UserError(f"shard={shard!r}: must be i/n, with i from 0 to n - 1")
    pieces, source = _open(dataset)
    encoder = tokenizers.find(tokenizer, data_dir)
    if not isinstance(encoder, BpeTokenizer) or encoder.eot is None:
        need = f"documents need gpt2, or a tokenizer.json that has {tokenizers.END_OF_TEXT}"
        raise UserError(f"tokenizer={tokenizer!r}: {need}")
    path = Path(dataset).resolve()
    name = dataset if dataset in HUB else path.stem if path.is_file() else path.name
    folder = Path(data_dir, name)
    manifest = {
        "source": source,
        "pieces": len(pieces),
        "val_share": val_share or VAL_FRACTION[dataset in HUB],
        "tokenizer": encoder.kind,
        "tokenizer_sha256": hashlib.sha256(encoder.to_json().encode()).hexdigest(),
        "vocab_size": encoder.vocab_size,
        "end_of_text": encoder.eot,
        "dtype": tokenizers.id_dtype(encoder.vocab_size).name,
    }
    _begin(folder, manifest, encoder)
    mine = dict(list(enumerate(pieces))[first::count])
    _make_pieces(folder, manifest, mine, min(processes or cores(), len(mine)))
    _finish(folder, manifest)
    return folder


def _open(dataset: str) -> tuple[list[Piece], str]:
    """Returns the pieces of a source, and its description, which also identifies it."""
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
    """Yields each file as a document."""
    for file in files:
        yield "".join(text for text, _ in read_text(file))


def _rows(source: str, count: int, keys: dict[str, Any]) -> list[Piece]:
    """Cuts what the library `datasets` streams into at most `count` pieces of whole row groups."""
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
        raise UserError(f"{_first_line(error)}; run the same command again to continue") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _begin(folder: Path, manifest: dict[str, Any], encoder: BpeTokenizer) -> None:
    """Marks the folder as unfinished. Raises `UserError` if it holds something else."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file, but its name is that of the folder to be made")
    for note in folder.glob("[0-9]*.json"):
        begun = _read(note)["plan"]
        for key, value in manifest.items():
            if begun.get(key) != value:
                said = f"was begun with {key}={begun.get(key)!r}, and this is {value!r}"
                raise UserError(f"{folder}: {said}; delete it to begin anew")
    meta = folder / META
    if meta.exists() and "pieces" not in _read(meta):
        raise UserError(f"{folder}: holds another dataset; delete it or take another --data_dir")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / tokenizers.FILE, encoder.to_json(), shared=True)
    (folder / (META + PARTIAL)).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _make_pieces(folder: Path, manifest: dict, pieces: dict[int, Piece], processes: int) -> None:
    """Makes the pieces that are not whole yet, in worker processes."""
    began, made = time.perf_counter(), 0
    console, spawn = Console(stderr=True), multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max(1, processes), spawn, _start_worker)
    with Progress(console=console) as progress, pool:
        task = progress.add_task(f"tokenizing {folder.name}", total=len(pieces))
        jobs = [pool.submit(_make_piece, folder, manifest, n, piece) for n, piece in pieces.items()]
        try:
            for job in as_completed(jobs):
                made += job.result()
                rate = made / (time.perf_counter() - began)
                about = f"{folder.name}: {made:,} tokens, {rate:,.0f} tokens/s"
                progress.update(task, advance=1, description=about)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.perf_counter() - began
    console.print(f"{made:,} tokens in {seconds:,.1f} s by {processes} processes", highlight=False)


def _start_worker() -> None:
    """Keeps a worker to one core, and ends it with the process that started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os._exit(1)


def _make_piece(folder: Path, manifest: dict[str, Any], number: int, piece: Piece) -> int:
    """Writes a piece, unless its files are as its note says -> how many tokens it wrote."""
    files, note = _files(folder, number)
    if note.exists():
        made = _read(note)
        if all(f.is_file() and sha256_of(f) == made[s]["sha256"] for s, f in files.items()):
            return 0
    encoder: Any = LOAD_ONCE(folder / tokenizers.FILE)
    counts, sums, _ = write_partial(files, _encode(piece(), encoder, manifest["val_share"]))
    name_partial(files)
    made = {s: {"tokens": counts[s], "sha256": sums[s]} for s in SPLITS} | {"plan": manifest}
    atomic_write(note, json.dumps(made, indent=1))
    return sum(counts.values())


def _encode(texts: Iterable[str], encoder: BpeTokenizer, val_share: float) -> SplitIds:
    """Yields the ids of documents by split. Copies of a document are in one split."""
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        parts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for text in batch:
            digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
            is_val = int.from_bytes(digest[:8], "little") < val_share * 2**64
            parts["val" if is_val else "train"].append(text)
        for split, documents in parts.items():
            yield split, encoder.encode_documents(documents)


def _files(folder: Path, number: int) -> tuple[dict[str, Path], Path]:
    """Returns the token files of a piece by split, and its note."""
    files = {split: folder / f"{split}_{number:05d}.bin" for split in SPLITS}
    return files, folder / f"{number:05d}.json"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes meta.json, if all pieces are there."""
    pieces = [_files(folder, number) for number in range(manifest["pieces"])]
    made = [(files, _read(note)) for files, note in pieces if note.exists()]
    missing = len(pieces) - len(made)
    if missing:
        print(f"{missing} of {len(pieces)} pieces are still to come, from other shards")
        return
    counts, sums = dict.fromkeys(SPLITS, 0), {split: {} for split in SPLITS}
    for split in SPLITS:
        for files, note in made:
            if note[split]["tokens"]:
                counts[split] += note[split]["tokens"]
                sums[split][files[split].name] = note[split]["sha256"]
        if not counts[split]:
            do = f"delete {folder} and begin anew with another one"
            share = f"val_share={manifest['val_share']}"
            raise UserError(f"{share}: leaves no document for {split}; {do}")
    meta = manifest | {"counts": counts, "sha256": sums}
    atomic_write(folder / META, json.dumps(meta, indent=1), shared=True)
    (folder / (META + PARTIAL)).unlink(missing_ok=True)
