"""Test document datasets: encoding, kills, several machines, damage and user errors."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tokenizers as library
from helpers import CHILD_ENV, read_files, refusal

from jaxgpt.config import UserError
from jaxgpt.data import documents
from jaxgpt.data.documents import HubSet
from jaxgpt.data.prepare import prepare
from jaxgpt.data.tokenizer import END_OF_TEXT, BpeTokenizer
from jaxgpt.data.tokens import open_dataset

WORDS = ["When", "shall", "we", "three", "meet", "again", "in", "thunder", "or", "rain"]


def make_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, count)
    return [" ".join(rng.choice(WORDS, n)) + f"\n{i}.\n" for i, n in enumerate(lengths)]


def write_texts(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return str(folder)


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory) -> str:
    """Write a byte-level BPE of WORDS with end-of-text as the last id; return the path."""
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 299, "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(WORDS, library.trainers.BpeTrainer(**options))
    bpe.add_special_tokens([END_OF_TEXT])
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(str(file))
    return str(file)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1500)


def is_val(text: str, share: float) -> bool:
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "little") / 2**64 < share


def assert_holds(folder: Path, texts: list[str], bpe_file: str, share: float) -> None:
    """Assert that the dataset holds each document's ids in order, each followed by end-of-text."""
    plain = library.Tokenizer.from_file(bpe_file)
    plain.encode_special_tokens = True
    end = plain.token_to_id(END_OF_TEXT)
    dataset = open_dataset(folder, folder, 0)
    for tokens, val in ((dataset.train, False), (dataset.val, True)):
        kept = [text for text in texts if is_val(text, share) == val]
        expected = [id for text in kept for id in [*plain.encode(text).ids, end]]
        np.testing.assert_array_equal(tokens.read(0, len(tokens)), expected)
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.eot == end


def test_documents_are_encoded_independently_with_end_of_text(tmp_path, bpe_file):
    """Copies of a document stay in the same split, because `is_val` depends only on the text."""
    texts = [*make_texts(80), f"not {END_OF_TEXT} a mark", "\u20ac\U0001f600", *make_texts(20)]
    source = write_texts(tmp_path / "plays", texts)
    folder = prepare(source, str(tmp_path / "data"), bpe_file, val_share=0.2, processes=2)
    assert folder == tmp_path / "data" / "plays"
    assert_holds(folder, texts, bpe_file, 0.2)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["pieces"] > 5
    for split, sums in meta["sha256"].items():
        files = {name: (folder / name).read_bytes() for name in sums}
        assert {n: hashlib.sha256(b).hexdigest() for n, b in files.items()} == sums
        assert sum(map(len, files.values())) == 2 * meta["counts"][split]


def test_gpt2_is_the_default_tokenizer_for_documents(tmp_path, gpt2_data, gpt2):
    texts = make_texts(9)
    folder = prepare(write_texts(tmp_path / "plays", texts), str(gpt2_data), val_share=0.5)
    train = open_dataset(folder, gpt2_data, 0).train
    kept = [text for text in texts if not is_val(text, 0.5)]
    expected = [id for text in kept for id in [*gpt2.encode(text), 50256]]
    np.testing.assert_array_equal(train.read(0, len(train)), expected)


def test_missing_tiktoken_is_said_once_for_gpt2_only(tmp_path, gpt2_data, bpe_file, capfd):
    source = write_texts(tmp_path / "verses", make_texts(9))
    said = "tiktoken is not installed"
    with patch.dict(sys.modules, {"tiktoken": None}):
        prepare(source, str(tmp_path / "own"), bpe_file, val_share=0.2, processes=2)
        assert said not in capfd.readouterr().err
        folder = prepare(source, str(gpt2_data), val_share=0.5, processes=2)
        assert capfd.readouterr().err.count(said) == 1
    shutil.rmtree(folder)


def test_sharded_preparation_writes_the_same_files_as_one_machine(tmp_path, bpe_file, capsys):
    source = write_texts(tmp_path / "plays", make_texts(80))
    alone = prepare(source, str(tmp_path / "alone"), bpe_file, val_share=0.2)
    shared = tmp_path / "shared"
    for shard in ("2/3", "0/3"):
        prepare(source, str(shared), bpe_file, val_share=0.2, shard=shard)
        assert "pieces are missing" in capsys.readouterr().out
        assert "interrupted" in refusal(open_dataset, shared / "plays", tmp_path, 0)
    prepare(source, str(shared), bpe_file, val_share=0.2, shard="1/3")
    assert read_files(shared / "plays") == read_files(alone)


PREPARE = """
import sys, time
from jaxgpt.data import documents
from jaxgpt.data.tokenizer import BpeTokenizer
encode = BpeTokenizer.encode_documents
BpeTokenizer.encode_documents = lambda *args: time.sleep(0.05) or encode(*args)  # in workers too
if __name__ == "__main__":
    documents.PIECE_BYTES = 1500
    documents.prepare(*sys.argv[1:], val_share=0.2, processes=2)
"""


@pytest.mark.slow
def test_preparation_killed_twice_resumes_to_identical_files(tmp_path, bpe_file):
    """Each kill comes after one more piece; workers must stop when the parent process is dead."""
    texts = make_texts(150)
    source = write_texts(tmp_path / "plays", texts)
    whole = prepare(source, str(tmp_path / "whole"), bpe_file, val_share=0.2)
    script = tmp_path / "run.py"
    script.write_text(PREPARE)
    command = [sys.executable, script, source, tmp_path / "killed", bpe_file]
    folder, kills = tmp_path / "killed" / "plays", 0
    while kills < 2:
        before = len(list(folder.glob("0*.json")))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=CHILD_ENV, **pipes) as process:
            while process.poll() is None and len(list(folder.glob("0*.json"))) == before:
                time.sleep(0.001)
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)  # returns when the workers, who share the pipe, end
        kills += 1
        left = sorted(folder.iterdir())
        time.sleep(0.5)
        assert sorted(folder.iterdir()) == left
        assert not (folder / "meta.json").exists(), "too quick to be killed"
        assert "interrupted" in refusal(open_dataset, folder, tmp_path, 0)
    subprocess.run(command, env=CHILD_ENV, check=True, capture_output=True)
    assert read_files(folder) == read_files(whole)
    assert_holds(folder, texts, bpe_file, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no note"])
def test_damaged_or_missing_piece_is_rebuilt_and_others_are_kept(tmp_path, bpe_file, harm):
    source = write_texts(tmp_path / "plays", make_texts(40))
    make = lambda: prepare(source, str(tmp_path / "data"), bpe_file, val_share=0.2)
    folder = make()
    files = read_files(folder)
    victim = folder / "train_00001.bin"
    ids = victim.read_bytes()
    if harm == "cut":
        victim.write_bytes(ids[:-2])
        message = refusal(open_dataset, folder, folder, 0)
        assert re.search(r"train_\*\.bin: .* meta\.json says", message)
    elif harm == "changed":
        victim.write_bytes(b"\1\0" + ids[2:])
    else:
        (victim if harm == "gone" else folder / "00001.json").unlink()
    made = {path: path.stat().st_mtime_ns for path in folder.glob("train_*")}
    assert read_files(make()) == files
    anew = {path for path in made if path.stat().st_mtime_ns != made[path]}
    assert anew <= {victim}, "whole pieces are left alone"


@pytest.fixture
def parquet(monkeypatch):
    """Turn off the download counts of `datasets`, which would contact a server."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


def write_parquet(folder: Path, texts: list[str | None]) -> str:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for i in range(3):
        part = texts[i * len(texts) // 3 : (i + 1) * len(texts) // 3]
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=10)
    return str(folder)


def test_parquet_texts_are_encoded_as_documents(tmp_path, bpe_file, parquet):
    texts = make_texts(80)
    source = write_parquet(tmp_path / "plays", [*texts[:30], None, "", *texts[30:]])
    folder = prepare(source, str(tmp_path / "data"), bpe_file, val_share=0.2)
    assert_holds(folder, texts, bpe_file, 0.2)
    assert json.loads((folder / "meta.json").read_text())["pieces"] > 5
    one = prepare(f"{source}/1.parquet", str(tmp_path / "one"), bpe_file, val_share=0.2)
    assert one == tmp_path / "one" / "1"
    assert_holds(one, texts[27:52], bpe_file, 0.2)


def test_hub_dataset_needs_only_an_entry_in_the_hub_table(tmp_path, bpe_file, parquet, monkeypatch):
    """A local folder with the hub's layout replaces the hub, because tests have no network."""
    texts = make_texts(80)
    source = write_parquet(tmp_path / "plays", list(texts))
    monkeypatch.setitem(documents.HUB, "bard", HubSet(source, "default", "abc", 4))
    monkeypatch.setattr(documents, "HUB_VAL_FRACTION", 0.2)
    folder = prepare("bard", str(tmp_path / "data"), bpe_file)
    assert folder == tmp_path / "data" / "bard"
    assert_holds(folder, texts, bpe_file, 0.2)
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["pieces"], meta["source"]) == (4, f"{source}, default, revision abc")


def test_parquet_without_texts_or_with_bad_content_is_rejected(tmp_path, bpe_file, parquet):
    import pyarrow
    import pyarrow.parquet

    file = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), file)
    assert "text" in refusal(prepare, file, str(tmp_path / "data"), bpe_file)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
    message = refusal(prepare, file, str(tmp_path / "numbers"), bpe_file)
    assert "its column text holds int; expected texts" in message
    (tmp_path / "a.parquet").write_bytes(b"none")
    assert re.search(
        r"a\.parquet: .*\(\w+: .*column text",
        refusal(prepare, file, str(tmp_path / "data"), bpe_file),
    )
    assert not (tmp_path / "data").exists()


def test_missing_datasets_library_error_names_the_pip_extra(tmp_path, bpe_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal(prepare, "openwebtext", str(tmp_path / "data"), bpe_file)
    assert "pip install 'jaxgpt[data]'" in message


def test_pieces_of_a_different_preparation_are_rejected_and_kept(tmp_path, bpe_file):
    source = write_texts(tmp_path / "plays", make_texts(40))
    folder = prepare(source, str(tmp_path / "data"), bpe_file, val_share=0.2)
    files = read_files(folder)
    message = refusal(prepare, source, str(tmp_path / "data"), bpe_file, val_share=0.3)
    assert "begun with val_share=0.2, but now val_share=0.3; expected a new folder; try " in message
    (tmp_path / "plays" / "z.txt").write_text("one more")
    message = refusal(prepare, source, str(tmp_path / "data"), bpe_file, val_share=0.2)
    assert re.search("begun with source='.* 40 files", message)
    assert read_files(folder) == files
    options = {"val_share": 0.3}
    named = prepare(source, str(tmp_path / "data"), bpe_file, name="other", **options)
    assert named == tmp_path / "data" / "other"
    assert read_files(folder) == files
    assert prepare(source, str(tmp_path / "data"), bpe_file, overwrite=True, **options) == folder
    assert read_files(folder) == read_files(named) != files


def test_documents_edited_to_as_many_bytes_are_another_source(tmp_path, bpe_file):
    source = write_texts(tmp_path / "plays", make_texts(10))
    folder = prepare(source, str(tmp_path / "data"), bpe_file, val_share=0.2)
    files = read_files(folder)
    edited = tmp_path / "plays" / "0009.txt"
    edited.write_bytes(edited.read_bytes().swapcase())
    message = refusal(prepare, source, str(tmp_path / "data"), bpe_file, val_share=0.2)
    assert "plays: was begun with source='" in message
    assert read_files(folder) == files


def test_pieces_without_notes_are_compared_by_their_meta_json(tmp_path, bpe_file):
    source = write_texts(tmp_path / "plays", make_texts(10))
    folder = prepare(source, str(tmp_path / "data"), bpe_file, val_share=0.2)
    for note in folder.glob("0*.json"):
        note.unlink()
    files = read_files(folder)
    message = refusal(prepare, source, str(tmp_path / "data"), bpe_file, val_share=0.3)
    assert "begun with val_share=0.2, but now val_share=0.3" in message
    assert read_files(folder) == files


def test_json_files_of_the_user_in_the_folder_are_no_notes_and_are_kept(tmp_path, bpe_file):
    folder = tmp_path / "plays"
    write_texts(folder, make_texts(10))
    (folder / "2024.json").write_text("[1]")
    for share in 0.2, 0.3:
        prepare(str(folder), str(tmp_path), bpe_file, val_share=share, overwrite=True)
        assert (folder / "2024.json").read_text() == "[1]"


def test_json_file_of_the_user_with_the_name_of_a_note_is_not_replaced(tmp_path, bpe_file):
    folder = tmp_path / "plays"
    write_texts(folder, make_texts(10))
    for text in "{}", "[5]", "5", '{"line": 1}\n{"line": 2}\n':
        (folder / "00000.json").write_text(text)
        message = refusal(prepare, str(folder), str(tmp_path), bpe_file, overwrite=True)
        assert "00000.json: its name is that of a file which jaxgpt writes" in message
        assert (folder / "00000.json").read_text() == text


def test_text_replaces_all_pieces_of_a_set_of_documents(tmp_path, bpe_file):
    folder = write_texts(tmp_path / "plays", make_texts(10))
    data = prepare(folder, str(tmp_path / "data"), bpe_file, val_share=0.2)
    (data / "00007.json").write_text("[5]")  # no note of ours
    (tmp_path / "plays.txt").write_text("to be or not to be\n" * 9)
    prepare(str(tmp_path / "plays.txt"), str(tmp_path / "data"), overwrite=True)
    names = {"train.bin", "val.bin", "meta.json", "tokenizer.json", "00007.json"}
    assert {path.name for path in data.iterdir()} == names


def test_texts_beside_parquet_files_are_left_out_with_a_note(tmp_path, bpe_file, capsys):
    write_texts(tmp_path / "plays", make_texts(3))
    (tmp_path / "plays" / "a.parquet").touch()
    with suppress(UserError):  # the file is empty, or the library that reads it is missing
        prepare(str(tmp_path / "plays"), str(tmp_path), bpe_file)
    note = "its 3 .txt files are left out, because it also holds .parquet files"
    assert f"plays: {note}" in capsys.readouterr().err


def test_empty_documents_are_rejected(tmp_path, bpe_file):
    source = write_texts(tmp_path / "plays", ["", ""])
    message = refusal(prepare, source, str(tmp_path / "data"), bpe_file)
    assert message == f"{source}: its files are empty; expected documents in them"


def test_folder_of_another_dataset_is_rejected_and_unchanged(tmp_path, bpe_file):
    (tmp_path / "some.txt").write_text("to be or not to be\n" * 9)
    folder = prepare(str(tmp_path / "some.txt"), str(tmp_path))
    (folder / "input.txt").write_text("to be")
    files = read_files(folder)
    assert "some: holds another dataset" in refusal(prepare, str(folder), str(tmp_path), bpe_file)
    assert read_files(folder) == files


@pytest.mark.parametrize(
    ("tokenizer", "options", "said"),
    [
        *((None, {"shard": shard}, f"shard='{shard}': not a share; expected i/n")
          for shard in ("1", "3/3", "-1/3", "0/0", "a/b")),
        *((name, {}, f"tokenizer='{name}': not for documents; expected gpt2, or")
          for name in ("char", "byte", "none.json")),
        (None, {}, "val_share=0.01: leaves no document for val"),
    ],
)  # fmt: skip
def test_invalid_document_options_are_rejected_by_name(
    tmp_path, bpe_file, tokenizer, options, said
):
    source = write_texts(tmp_path / "plays", ["a"])
    assert said in refusal(
        prepare, source, str(tmp_path / "data"), tokenizer or bpe_file, **options
    )
    folder = tmp_path / "data" / "plays"
    if folder.exists():
        assert "interrupted" in refusal(open_dataset, folder, tmp_path, 0)


def test_shard_option_is_rejected_for_a_single_text(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("abc" * 9)
    message = refusal(prepare, str(file), str(tmp_path / "data"), shard="0/2", processes=0)
    assert "shard='0/2': applies to documents" in message


def test_non_utf8_document_is_rejected_with_file_and_byte(tmp_path, bpe_file):
    source = write_texts(tmp_path / "plays", ["a"])
    (tmp_path / "plays" / "b.txt").write_bytes(b"a\xff")
    message = refusal(prepare, source, str(tmp_path / "data"), bpe_file)
    assert "b.txt: byte 1 (0xff) is not UTF-8" in message


def test_long_documents_encode_to_the_same_ids_as_in_one_piece(bpe_file):
    encoder = BpeTokenizer(library.Tokenizer.from_file(bpe_file))
    texts = [" ".join(WORDS * 8000), "", "a"]
    assert len(texts[0]) > 5 * 65_536
    ids = encoder.encode_documents(texts).tolist()
    one = library.Tokenizer.from_file(bpe_file).encode(texts[0]).ids
    assert ids == [*one, encoder.eot, encoder.eot, *encoder.encode("a").tolist(), encoder.eot]
    assert encoder.encode(END_OF_TEXT).tolist() == [encoder.eot], "elsewhere it is the mark"
