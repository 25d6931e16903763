"""Preparing a text by pieces against NumPy on the whole of it; interruptions; first use."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxgpt
from jaxgpt.config import Config, UserError
from jaxgpt.data import prepare as prepares
from jaxgpt.data import text as texts
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.prepare import find_dataset, prepare
from jaxgpt.data.text import Corpus, Download
from jaxgpt.data.tokenizer import CharTokenizer
from jaxgpt.data.tokens import open_dataset

FINAL = ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
VERSE = "ROMEO:\nBut, soft! what light through yonder window breaks?\n\n" * 30
SHAKESPEARE = Path(__file__).parents[2] / "data" / "shakespeare_char" / "input.txt"


def write_text(folder: Path, text: str, name: str = "some.txt") -> str:
    (folder / name).write_bytes(text.encode("utf-8"))
    return str(folder / name)


def read_ids(folder: Path) -> dict[str, np.ndarray]:
    """The ids, as the folder's meta.json says they are written."""
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return {
        split: np.fromfile(
            folder / f"{split}.bin", f"<{dtype}"[:1] + {"uint16": "u2", "uint32": "u4"}[dtype]
        )
        for split in ("train", "val")
    }


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def char_ids(whole: str, part: str) -> list[int]:
    """nanoGPT's prepare.py."""
    stoi = {ch: i for i, ch in enumerate(sorted(set(whole)))}
    return [stoi[ch] for ch in part]


def byte_ids(whole: str, part: str) -> list[int]:
    return list(part.encode("utf-8"))


def assert_prepared(folder: Path, text: str, ids_of, kind: str, vocab_size: int) -> None:
    """The files hold the ids of the first int(0.9 n) characters, and those of the rest."""
    n = int(len(text) * 0.9)
    ids = read_ids(folder)
    expected = {"train": ids_of(text, text[:n]), "val": ids_of(text, text[n:])}
    for split in ids:
        np.testing.assert_array_equal(ids[split], expected[split], err_msg=split)
    meta = json.loads((folder / "meta.json").read_text())
    files = {split: (folder / f"{split}.bin").read_bytes() for split in ids}
    assert meta["counts"] == {split: len(expected[split]) for split in ids}
    assert meta["sha256"] == {s: hashlib.sha256(files[s]).hexdigest() for s in ids}
    assert meta["dtype"] == ("uint16" if vocab_size <= 65_536 else "uint32")
    assert (meta["vocab_size"], meta["tokenizer"]) == (vocab_size, kind)
    assert sorted(path.name for path in folder.iterdir()) == FINAL
    tokenizer = open_dataset(folder, folder, 0).tokenizer
    assert tokenizer.decode(ids["train"]) + tokenizer.decode(ids["val"]) == text


# --- The ids ------------------------------------------------------------------------------------


@given(st.text(min_size=2) | st.text("ab \n\u20ac\U0001f600", min_size=2), st.integers(1, 9))
@example("ab", 1)
@example("no break and no end" * 3, 4)
@example("\n\n\n\0\n\n", 1)
def test_char_and_byte_ids_are_those_of_the_whole_text(tmp_path_factory, text, chunk):
    folder = tmp_path_factory.mktemp("prepare")
    file = write_text(folder, text)
    with patch.object(texts, "CHUNK_BYTES", chunk):
        char, byte = (prepare(file, str(folder / kind), kind) for kind in ("char", "byte"))
    assert (char, byte) == (folder / "char" / "some", folder / "byte" / "some")
    assert_prepared(char, text, char_ids, "char", len(set(text)))
    assert_prepared(byte, text, byte_ids, "byte", 256)


@settings(max_examples=50)
@given(
    st.text("ab'sd1.\u00e9\U0001f600 \n\t\r\x1c\x85", min_size=2),
    st.integers(1, 9),
)
@example("Friends, Romans, countrymen, " * 4, 5)  # not one line break
@example("antidisestablishmentarianism" * 3, 5)  # nowhere to cut at all
@example("a\n" + "hello world's end " * 5, 7)
def test_gpt2_ids_are_those_of_the_whole_text(gpt2, tmp_path_factory, text, chunk):
    folder = tmp_path_factory.mktemp("prepare")
    file = write_text(folder, text)
    with (
        patch.object(texts, "CHUNK_BYTES", chunk),
        patch.object(tokenizers, "gpt2", lambda data_dir: gpt2),
    ):
        prepare(file, str(folder / "data"), "gpt2")
    whole = lambda _, part: gpt2.encode(part)  # which test_tokenizer.py holds against tiktoken
    assert_prepared(folder / "data" / "some", text, whole, "gpt2", 50_257)


def test_more_than_65536_characters_take_four_bytes(tmp_path):
    text = "".join(map(chr, range(0xE000, 0xE000 + 70_000)))[::-1]
    with patch.object(texts, "CHUNK_BYTES", 50_001):
        folder = prepare(write_text(tmp_path, text), str(tmp_path))
    assert (folder / "train.bin").stat().st_size == 4 * 63_000
    np.testing.assert_array_equal(read_ids(folder)["train"], np.arange(70_000)[:6_999:-1])
    assert_prepared(folder, text, char_ids, "char", 70_000)


def test_tokenizer_may_be_a_file(tmp_path):
    (tmp_path / "wide.json").write_text(CharTokenizer(VERSE + "xyz0").to_json())
    folder = prepare(write_text(tmp_path, VERSE), str(tmp_path), str(tmp_path / "wide.json"))
    ids = lambda _, part: char_ids(VERSE + "xyz0", part)
    assert_prepared(folder, VERSE, ids, "char", len(set(VERSE + "xyz0")))


@pytest.mark.skipif(
    not SHAKESPEARE.exists(),
    reason=f"needs {SHAKESPEARE.name} in data/shakespeare_char: {texts.TINY_SHAKESPEARE.url}",
)
@pytest.mark.parametrize(
    ("name", "train", "val", "vocab_size"),
    [("shakespeare_char", 1_003_854, 111_540, 65), ("shakespeare", 301_966, 36_059, 50_257)],
)
def test_shakespeare_has_the_counts_in_nanogpts_readmes(
    request, tmp_path, name, train, val, vocab_size
):
    if name == "shakespeare":
        request.getfixturevalue("gpt2")
        (tmp_path / "gpt2").symlink_to(SHAKESPEARE.parents[1] / "gpt2")
    (tmp_path / name).mkdir()
    shutil.copy(SHAKESPEARE, tmp_path / name)
    meta = json.loads((prepare(name, str(tmp_path)) / "meta.json").read_text())
    assert (meta["counts"], meta["vocab_size"]) == ({"train": train, "val": val}, vocab_size)
    assert meta["source"].startswith("tiny Shakespeare")


def test_text_is_streamed(tmp_path):
    """Its 60 MB never are in memory; half of them is far more than pieces of 1 MB need."""
    line = "It is a truth universally acknowledged, that a single man in possession\n"
    file, times = tmp_path / "long.txt", 60_000_000 // len(line)
    file.write_text(line * times)
    tracemalloc.start()
    with patch.object(texts, "CHUNK_BYTES", 1 << 20):
        folder = prepare(str(file), str(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (folder / "train.bin").stat().st_size == 2 * int(0.9 * len(line) * times)
    assert peak < 30_000_000
