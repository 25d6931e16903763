"""Fetch token files in llm.c's format from the Hugging Face hub, without tokenizing anything.

The hub states the SHA-256 of every file of a revision. A file gets its name in the dataset's folder
only when it has this checksum. meta.json, which is written last, records the checksums. Preparing
again verifies the files, and adds further ones if more are wanted.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from jaxgpt.config import UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokenizer import BpeTokenizer
from jaxgpt.data.tokens import GPT2_VOCAB, META, PARTIAL, TokenSplit
from jaxgpt.runtime.files import atomic_write, import_extra, make_folder, sha256_of

DOWNLOADS = "downloads" + PARTIAL  # a folder, whose name marks the dataset as unfinished
AGAIN = "try the same command again, which keeps the complete files"


class ShardSet(NamedTuple):
    """A dataset of the hub with GPT-2's ids: one validation shard and many training shards."""

    repo: str
    revision: str  # a commit, so that everybody gets the same tokens
    val: str  # file name
    train: str  # file name with the number of the shard, from 1
    shards: int  # number of training shards


SHARD_SETS = {
    "fineweb10B": ShardSet(
        "kjj0/fineweb10B-gpt2",
        "889765ea1f903759787add96995d81171b632d0c",
        "fineweb_val_000000.bin",
        "fineweb_train_{:06d}.bin",
        103,
    )
}


def prepare(dataset: str, data_dir: str, shards: int = 0, name: str = "") -> Path:
    """Fetch the validation shard and the first `shards` training shards; return their folder.

    The folder is `data_dir`/`name`; an empty name means `dataset`. 0 `shards` means all. Shards
    that meta.json already lists are verified, and are never deleted. Raises `UserError` for files
    that cannot be fetched or have another checksum.
    """
    source, folder = SHARD_SETS[dataset], Path(data_dir, name or dataset)
    if shards > source.shards:
        expected = f"at most {source.shards}, or 0 for all"
        raise UserError(f"shards={shards}: {dataset} has {source.shards}; expected {expected}")
    sums = _recorded_sums(folder, source)
    numbers = range(1, (shards or source.shards) + 1)
    wanted = [source.val, *(source.train.format(number) for number in numbers)]
    missing = [name for name in wanted if name not in sums]
    if missing:
        sums |= _sums_on_hub(dataset, missing)
    tokenizer = tokenizers.gpt2(data_dir)
    make_folder(folder / DOWNLOADS, str(folder), "--data_dir")
    for name in sorted(sums):
        _fetch(dataset, name, sums[name], folder)
    _finish(folder, source, sums, tokenizer)
    return folder


def _describe(source: ShardSet) -> str:
    return f"{source.repo}, revision {source.revision}"


def _recorded_sums(folder: Path, source: ShardSet) -> dict[str, str]:
    """Return the checksums in meta.json by file name. Raises `UserError` for another dataset."""
    file = folder / META
    if not file.exists():
        return {}
    with suppress(ValueError, KeyError, TypeError):
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["source"] == _describe(source):
            return meta["sha256"]["train"] | meta["sha256"]["val"]
    advice = "try another --name, or delete the folder"
    raise UserError(f"{folder}: holds another dataset; expected {_describe(source)}; {advice}")


def _sums_on_hub(dataset: str, names: list[str]) -> dict[str, str]:
    """Ask the hub for the SHA-256 of these files at the pinned revision."""
    hub, source = import_extra("huggingface_hub", dataset, "hf"), SHARD_SETS[dataset]
    keys = {"revision": source.revision, "repo_type": "dataset"}
    try:
        files = hub.HfApi().get_paths_info(source.repo, names, **keys)
    except Exception as error:  # offline, no such repository or revision: the hub raises many types
        problem = f"the hub has not listed its files ({type(error).__name__})"
        expected = f"{_describe(source)}, on a hub that is online"
        raise UserError(f"{dataset}: {problem}; expected {expected}") from error
    sums = {file.path: file.lfs.sha256 for file in files if file.lfs}
    for name in names:
        if name not in sums:
            problem = f"the hub has no checksum of {name}"
            raise UserError(f"{dataset}: {problem}; expected all files of {_describe(source)}")
    return sums


def _fetch(dataset: str, name: str, sha256: str, folder: Path) -> None:
    """Download a file to the folder, unless the folder has it with this checksum."""
    file, source = folder / name, SHARD_SETS[dataset]
    if file.is_file() and sha256_of(file) == sha256:
        return
    hub = import_extra("huggingface_hub", dataset, "hf")
    keys = {"revision": source.revision, "repo_type": "dataset"}
    try:
        path = hub.hf_hub_download(source.repo, name, local_dir=folder / DOWNLOADS, **keys)
    except Exception as error:  # offline, disk full: many types
        problem = f"could not be downloaded ({type(error).__name__})"
        expected = f"{_describe(source)}, on a hub that is online"
        raise UserError(f"{file}: {problem}; expected {expected}; {AGAIN}") from error
    downloaded = Path(path)
    found = sha256_of(downloaded)
    if found != sha256:
        downloaded.unlink()
        raise UserError(f"{file}: downloaded SHA-256 {found}; expected {sha256}; {AGAIN}")
    downloaded.replace(file)


def _finish(folder: Path, source: ShardSet, sums: dict[str, str], tokenizer: BpeTokenizer) -> None:
    """Write tokenizer.json and meta.json, and remove the mark of an unfinished dataset."""
    names = {"train": sorted(sums.keys() - {source.val}), "val": [source.val]}
    counts = {
        split: len(TokenSplit([folder / name for name in names[split]], "uint16", GPT2_VOCAB))
        for split in names
    }
    meta = {
        "source": _describe(source),
        "tokenizer": tokenizer.kind,
        "vocab_size": GPT2_VOCAB,
        "end_of_text": tokenizer.eot,
        "dtype": "uint16",
        "counts": counts,
        "sha256": {split: {name: sums[name] for name in names[split]} for split in names},
    }
    atomic_write(folder / tokenizers.FILE, tokenizer.to_json())
    atomic_write(folder / META, json.dumps(meta, indent=1))
    shutil.rmtree(folder / DOWNLOADS)
