"""Test token files, written here from the format descriptions, and damaged files."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import CHILD_ENV, refusal
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.data.foreign import likely_dtype
from jaxgpt.data.tokenizer import CharTokenizer
from jaxgpt.data.tokens import Dataset, TokenSplit, is_prepared, open_dataset

GPT2_VOCAB = 50_257
RNG = np.random.default_rng(0)
each_split = pytest.mark.parametrize("split", ["train", "val"])


def write_ids(file: Path, ids, dtype: str = "<u2") -> Path:
    file.write_bytes(np.asarray(ids).astype(dtype).tobytes())
    return file


def write_shard(file: Path, ids, count: int | None = None) -> Path:
    """Write llm.c's shard (data_common.py): 256 int32 (magic, version, tokens), then uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids) if count is None else count
    file.write_bytes(header.tobytes() + np.asarray(ids).astype("<u2").tobytes())
    return file


def open_folder(folder: Path, block_size: int = 4) -> Dataset:
    return open_dataset(folder, folder / "nowhere", block_size)


def assert_holds(tokens: TokenSplit, ids) -> None:
    assert len(tokens) == len(ids)
    np.testing.assert_array_equal(tokens.read(0, len(ids)), ids)


def assert_dataset(dataset: Dataset, splits: dict, vocab_size: int) -> None:
    """Assert that both splits hold these ids and have this vocabulary size."""
    assert_holds(dataset.train, splits["train"])
    assert_holds(dataset.val, splits["val"])
    sizes = dataset.vocab_size, dataset.train.vocab_size, dataset.val.vocab_size
    assert sizes == (vocab_size,) * 3


@given(
    parts=st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=5), min_size=1),
    wide=st.booleans(),
    data=st.data(),
)
@example(parts=[[1], [2], [3]], wide=False, data=None)
def test_read_returns_a_slice_of_the_concatenated_files(tmp_path_factory, parts, wide, data):
    folder = tmp_path_factory.mktemp("tokens")
    dtype, scale = ("uint32", 65_537) if wide else ("uint16", 1)
    parts = [np.array(part, dtype) * np.array(scale, dtype) for part in parts]
    whole = np.concatenate(parts)
    files = [write_ids(folder / f"{i}.bin", part, dtype) for i, part in enumerate(parts)]
    tokens = TokenSplit(files, dtype, vocab_size=2**32)
    assert len(tokens) == len(whole)
    spans = [(i, j) for j in range(len(whole) + 1) for i in range(j)]
    for start, stop in spans if data is None else [data.draw(st.sampled_from(spans))]:
        ids = tokens.read(start, stop - start)
        assert ids.dtype == dtype
        np.testing.assert_array_equal(ids, whole[start:stop])


def test_ids_are_little_endian(tmp_path):
    file = tmp_path / "some.bin"
    file.write_bytes(bytes([1, 2, 3, 4, 5, 6, 7, 0]))
    assert_holds(TokenSplit([file], "uint16", 2**16), [0x0201, 0x0403, 0x0605, 0x0007])
    assert_holds(TokenSplit([file], "uint32", 2**32), [0x04030201, 0x00070605])


@pytest.mark.parametrize("at", [0, 4, 5, 8, 11])
def test_out_of_range_id_is_named_with_file_and_position(tmp_path, at):
    """The files hold 5, 4 and 3 ids; every read reports the position within the file."""
    ids = np.arange(12) % 10
    ids[at] = 10
    names = [f"{part}.bin" for part in "abc"]
    for name, part in zip(names, np.split(ids, [5, 9]), strict=True):
        write_ids(tmp_path / name, part)
    tokens = TokenSplit([tmp_path / name for name in names], "uint16", vocab_size=10)
    file = int(np.searchsorted([5, 9], at, "right"))
    expected = f"{names[file]}: id 10 at token {at - [0, 5, 9][file]} is out of range; expected"
    for start in range(at + 1):
        assert expected in refusal(tokens.read, start, at + 1 - start)
        np.testing.assert_array_equal(tokens.read(start, at - start), ids[start:at])
    np.testing.assert_array_equal(tokens.read(at + 1, 11 - at), ids[at + 1 :])


def test_file_that_becomes_shorter_while_it_is_open_is_an_error(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(20_000))
    split = TokenSplit([tmp_path / "a.bin"], "uint16", 5)
    os.truncate(tmp_path / "a.bin", 10_000)
    assert len(split.read(0, 5000)) == 5000
    assert "has become shorter" in refusal(split.read, 4000, 2000)


def test_llmc_shards_are_concatenated_in_name_order(tmp_path, no_gpt2):
    shards = {name: RNG.integers(0, GPT2_VOCAB, 9) for name in ("000002", "000001", "000010")}
    for name, ids in shards.items():
        write_shard(tmp_path / f"fineweb_train_{name}.bin", ids)
    val = RNG.integers(0, GPT2_VOCAB, 7)
    write_shard(tmp_path / "fineweb_val_000000.bin", val)
    dataset = open_folder(tmp_path)
    train = np.concatenate([shards[name] for name in sorted(shards)])
    assert_dataset(dataset, {"train": train, "val": val}, GPT2_VOCAB)
    assert dataset.tokenizer is None


def write_nanogpt(folder: Path, vocab_size: int = GPT2_VOCAB) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    splits = {"train": RNG.integers(0, vocab_size, 20), "val": RNG.integers(0, vocab_size, 10)}
    for split, ids in splits.items():
        write_ids(folder / f"{split}.bin", ids)
    return splits


def test_dataset_may_have_more_files_than_the_usual_limit(tmp_path):
    """macOS allows 256 open files, and Linux 1,024, unless a process asks for more."""
    for number in range(200):
        write_shard(tmp_path / f"train_{number:03}.bin", [number] * 3)
    write_shard(tmp_path / "val.bin", range(9))
    code = """
import resource, sys
from pathlib import Path
from jaxgpt.data.tokens import open_dataset
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (150, most))
folder = Path(sys.argv[1])
print(open_dataset(folder, folder, 4).train.read(597, 3)[0])
"""
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, env=CHILD_ENV, capture_output=True, text=True, check=True)
    assert done.stdout == "199\n"


def test_file_whose_name_holds_val_and_train_is_a_train_file(tmp_path, no_gpt2):
    write_ids(tmp_path / "retrieval_train.bin", range(9))
    write_ids(tmp_path / "retrieval_val.bin", range(5))
    splits = {"train": range(9), "val": range(5)}
    assert_dataset(open_folder(tmp_path), splits, GPT2_VOCAB)


def test_nanogpt_folder_without_meta_has_gpt2_vocabulary(tmp_path, no_gpt2):
    splits = write_nanogpt(tmp_path)
    (tmp_path / "input.txt").write_text("nanoGPT's data/shakespeare has a text too")
    assert_dataset(open_folder(tmp_path), splits, GPT2_VOCAB)
    assert open_folder(tmp_path).tokenizer is None
    write_ids(tmp_path / "val.bin", [0] * 6 + [GPT2_VOCAB])
    assert f"val.bin: id {GPT2_VOCAB} at token 6 " in refusal(open_folder, tmp_path)


OTHER_DTYPES = {  # dtype of val.bin -> (ids, words of the message)
    "uint32": (RNG.integers(0, GPT2_VOCAB, 200), "uint32 ids (every second 16-bit number is 0)"),
    "int64": (RNG.integers(0, 65, 200), "int64 ids (three of four 16-bit numbers are 0)"),
    "uint8": (RNG.integers(32, 127, 200), "uint8 ids (the bytes at even and at odd positions"),
    "int32": (
        RNG.integers(0, GPT2_VOCAB, 200) * np.resize([1, -1], 200),
        "int32 ids (every second 16-bit number is below 16 or 65535)",
    ),
    "<u4": (RNG.integers(0, 2**17, 200), "uint32 ids (every second 16-bit number is below 16)"),
}


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
@each_split
def test_files_of_another_dtype_without_meta_are_rejected_by_its_name(
    tmp_path, no_gpt2, split, dtype
):
    """The other file is uint16. All ids of the wrong file, read as uint16, can be in range."""
    ids, said = OTHER_DTYPES[dtype]
    for name in "train", "val":
        write_ids(tmp_path / f"{name}.bin", RNG.integers(0, GPT2_VOCAB, 200))
    write_ids(tmp_path / f"{split}.bin", ids, dtype)
    message = refusal(open_folder, tmp_path)
    assert message.startswith(f"{tmp_path}/{split}.bin: looks like {said}")


@given(st.sampled_from([2, 17, 65, 129, 300, 4000, 32_000, GPT2_VOCAB]), st.integers(0, 99))
@example(17, 9)  # its only ids of 16 are at even places
def test_uint16_ids_of_any_vocabulary_do_not_look_like_another_dtype(vocab_size, seed):
    """The ids have the frequencies of words: the n-th one is drawn with a probability of 1/n."""
    rng = np.random.default_rng(seed)
    ids = vocab_size ** rng.uniform(0, 1, 500) - 1
    assert likely_dtype(rng.permutation(vocab_size)[ids.astype(int)].astype(np.uint16)) is None


def test_splits_of_different_vocabularies_are_rejected(tmp_path, no_gpt2):
    sizes = {"train": GPT2_VOCAB, "val": 65}
    for splits in sizes, dict(zip(sizes, reversed(sizes.values()), strict=True)):
        for name, size in splits.items():
            write_ids(tmp_path / f"{name}.bin", np.arange(500) % size + (size > 65) * 100)
        larger = max(splits, key=splits.get)
        message = refusal(open_folder, tmp_path)
        assert message.startswith(f"{tmp_path}/{larger}.bin: 100% of its ids are above 64, ")


def test_unknown_vocabulary_is_assumed_and_said(tmp_path, no_gpt2):
    splits = write_nanogpt(tmp_path, 65)
    largest = max(ids.max() for ids in splits.values())
    start = f"{tmp_path}: its vocabulary is not known; assumed: "
    (note,) = open_folder(tmp_path).notes
    assert note.startswith(f"{start}GPT-2's 50,257 ids; try --vocab_size=N for another vocabulary,")
    (tmp_path / "meta.pkl").write_bytes(b"")
    (note,) = open_folder(tmp_path).notes
    assert note.startswith(f"{start}GPT-2's 50,257 ids, not the {largest + 1} that its files use: ")
    assert note.endswith(f"; try its text as {tmp_path}/input.txt, or --vocab_size={largest + 1}")
    dataset = open_dataset(tmp_path, tmp_path, 4, vocab_size=70)
    assert_dataset(dataset, splits, 70)
    assert dataset.notes == (f"{start}vocab_size=70; its tokenizer is not known either",)
    assert dataset.fingerprint["vocab_size"] == 70
    message = refusal(open_dataset, tmp_path, tmp_path, 4, vocab_size=int(largest))
    assert f"expected ids below vocab_size={largest}; try a larger --vocab_size" in message
    padded = open_dataset(tmp_path, tmp_path, 4, vocab_size=50_304)
    assert padded.vocab_size == GPT2_VOCAB


def test_nanogpt_folder_with_gpt2_files_has_gpt2_tokenizer(tmp_path, gpt2, gpt2_data):
    write_nanogpt(tmp_path)
    tokenizer = open_dataset(tmp_path, gpt2_data, 4).tokenizer
    assert tokenizer.kind == "gpt2"
    assert tokenizer.decode(gpt2.encode("Hello, world")) == "Hello, world"


class Bomb:
    """An object whose pickle creates the file `path` when the pickle is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nanogpt_meta_pickle_is_never_unpickled(tmp_path):
    text, burnt = "hello world, \u00e9!\n", tmp_path / "burnt"
    stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}  # nanoGPT's prepare.py
    splits = write_nanogpt(tmp_path / "char", len(stoi))
    bomb = pickle.dumps({"vocab_size": 5, "stoi": Bomb(burnt)})
    pickle.loads(bomb)
    burnt.unlink()  # loading the pickle creates the file, so the test can fail
    (tmp_path / "char" / "meta.pkl").write_bytes(bomb)
    (tmp_path / "char" / "input.txt").write_text(text, encoding="utf-8")
    dataset = open_folder(tmp_path / "char")
    assert not burnt.exists()
    assert_dataset(dataset, splits, len(stoi))
    assert dataset.tokenizer.encode("hold").tolist() == [stoi[ch] for ch in "hold"]


@pytest.mark.parametrize("content", [b"b\r\na\r\n", b"b\ra", b"b\na"])
def test_nanogpt_character_set_uses_python_text_mode_newlines(tmp_path, content):
    """nanoGPT opens input.txt as text, which makes every kind of line break a \\n."""
    write_nanogpt(tmp_path, 3)
    (tmp_path / "meta.pkl").write_bytes(b"")
    (tmp_path / "input.txt").write_bytes(content)
    with open(tmp_path / "input.txt", encoding="utf-8") as file:
        chars = sorted(set(file.read()))
    dataset = open_folder(tmp_path)
    assert dataset.vocab_size == len(chars)
    assert dataset.tokenizer.decode(range(len(chars))) == "".join(chars)


def test_nanogpt_character_folder_without_text_has_no_tokenizer(tmp_path):
    """Without the text, GPT-2's tokenizer would decode character ids as words."""
    write_nanogpt(tmp_path, 65)
    (tmp_path / "meta.pkl").write_bytes(b"")
    assert open_folder(tmp_path).tokenizer is None
    (tmp_path / "input.txt").write_bytes(b"abc\xff")
    assert "input.txt: byte 3 (0xff) is not UTF-8" in refusal(open_folder, tmp_path)


IDS = {"train": [0, 1, 2, 0, 1, 2, 0, 1], "val": [2, 1, 0, 2, 1, 0]}
META = {
    "dtype": "uint16", "vocab_size": 3, "tokenizer": "char", "counts": {"train": 8, "val": 6},
    "sha256": {"train": "", "val": ""}, "source": "here",
}  # fmt: skip


@pytest.fixture
def prepared(tmp_path):
    """Return a folder as `jaxgpt prepare` writes it."""
    for split, ids in IDS.items():
        write_ids(tmp_path / f"{split}.bin", ids)
    (tmp_path / "tokenizer.json").write_text(CharTokenizer("abc").to_json())
    (tmp_path / "meta.json").write_text(json.dumps(META))
    return tmp_path


def change_meta(folder: Path, **fields) -> None:
    (folder / "meta.json").write_text(json.dumps(META | fields))


def test_prepared_folder_opens_as_described_by_meta_json(prepared):
    dataset = open_folder(prepared)
    assert_dataset(dataset, IDS, 3)
    assert dataset.train.dtype == dataset.val.dtype == np.uint16
    assert dataset.tokenizer.decode([2, 1, 0]) == "cba"
    assert dataset.source == "here"


def test_prepared_uint32_folder_opens_with_uint32_ids(prepared):
    change_meta(prepared, dtype="uint32", vocab_size=2**31, counts={"train": 5, "val": 5})
    ids = [2**31 - 1, 0, 2**16, 1, 2]
    for split in ("train", "val"):
        write_ids(prepared / f"{split}.bin", ids, "<u4")
    dataset = open_folder(prepared)
    assert_holds(dataset.train, ids)
    assert dataset.train.dtype == np.uint32


@pytest.mark.parametrize(
    "fields",
    [{"vocab_size": 4}, {"counts": {"train": 8, "val": 5}}, {"sha256": {"train": "", "val": "0"}}],
)
def test_fingerprint_depends_on_contents_and_not_on_source(prepared, fields):
    fingerprint = open_folder(prepared).fingerprint
    change_meta(prepared, source="moved")
    assert open_folder(prepared).fingerprint == fingerprint  # the same ids
    change_meta(prepared, **fields)
    if "counts" in fields:
        write_ids(prepared / "val.bin", [0] * 5)
    assert open_folder(prepared).fingerprint != fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint


NOT_META = r"meta\.json: not valid"
BAD_FILES = {  # (file, content or None for a missing file, pattern of the message)
    "missing": ("val.bin", None, r"val\.bin: no such file"),
    "empty": ("val.bin", b"", r"val\.bin: holds no tokens"),
    "odd": ("val.bin", b"\0" * 11, r"val\.bin: holds 11 bytes"),
    "short": ("val.bin", b"\0" * 10, r"val\.bin: 5 tokens, .* says 6"),
    "long": ("train.bin", b"\0" * 18, r"train\.bin: 9 tokens, .* says 8"),
    "no JSON": ("meta.json", b"{", NOT_META),
    "no text": ("meta.json", b"\xff", NOT_META),
    "list": ("meta.json", b"[]", NOT_META),
    "null": ("meta.json", b"null", NOT_META),
    "no tokenizer": ("tokenizer.json", None, r"tokenizer\.json: not a token"),
    "bad tokenizer": ("tokenizer.json", b"{}", r"tokenizer\.json: not a tokenizer"),
    "partial ids": ("val.bin.partial", b"", "interrupted"),
    "partial meta": ("meta.json.partial", b"", "interrupted"),
}
BAD_META = {  # (fields of meta.json, pattern of the message)
    "other dtype": (META | {"dtype": "int16"}, r"meta\.json: has dtype='int16'"),
    "null dtype": (META | {"dtype": None}, r"meta\.json: has dtype=None"),
    "half counts": (META | {"counts": {"train": 8}}, r"meta\.json: .*'val'"),
    "odd counts": (META | {"counts": [8, 6]}, NOT_META),
    "odd sums": (META | {"sha256": "abc"}, NOT_META),
    "endless": (META | {"counts": {"train": math.inf, "val": 6}}, NOT_META),
    "odd vocab": (META | {"vocab_size": "many"}, r"meta\.json: .*many"),
    "wrong width": (META | {"dtype": "uint32"}, r"train\.bin: 4 tokens, but meta\.json says 8"),
} | {
    f"no {key}": ({k: v for k, v in META.items() if k != key}, rf"{NOT_META} .*'{key}'")
    for key in META
    if key != "sha256"
}
DAMAGE = BAD_FILES | {
    name: ("meta.json", json.dumps(meta).encode(), said) for name, (meta, said) in BAD_META.items()
}


def test_dataset_without_checksums_is_opened(prepared):
    meta = META | {"sha256": {"train": {}, "val": {}}}
    (prepared / "meta.json").write_text(json.dumps(meta))
    assert len(open_folder(prepared).train) == META["counts"]["train"]


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_dataset_file_is_rejected_with_the_reason(prepared, name):
    file, content, expected = DAMAGE[name]
    (prepared / file).unlink(missing_ok=True)
    if content is not None:
        (prepared / file).write_bytes(content)
    assert re.match(rf"{re.escape(str(prepared))}.*{expected}", refusal(open_folder, prepared))


@pytest.mark.parametrize(
    ("size", "count"), [(9, 8), (9, 10), (0, 0), (0, 9), (9, 0), (9, -9), (1, -1), (9, 2**31 - 1)]
)
def test_llmc_shard_with_wrong_or_zero_count_is_rejected(tmp_path, no_gpt2, size, count):
    write_shard(tmp_path / "a_train_1.bin", [0] * 9)
    write_shard(tmp_path / "a_train_2.bin", [0] * size, count)
    write_shard(tmp_path / "a_val.bin", [0] * 9)
    assert "a_train_2.bin: " in refusal(open_folder, tmp_path)


@pytest.mark.parametrize("size", [12, 14, 512, 1000, 1022, 1023])
def test_llmc_shard_with_truncated_header_is_rejected(tmp_path, no_gpt2, size):
    for count in (0, 9, (size - 1024) // 2):
        whole = write_shard(tmp_path / "a_train.bin", [0] * 9, count).read_bytes()
        (tmp_path / "a_train.bin").write_bytes(whole[:size])
        write_shard(tmp_path / "a_val.bin", [0] * 9)
        assert "a_train.bin: " in refusal(open_folder, tmp_path)


@each_split
def test_folder_without_a_split_is_rejected(tmp_path, no_gpt2, split):
    write_nanogpt(tmp_path)
    (tmp_path / f"{split}.bin").unlink()
    assert f"{tmp_path}: holds neither meta.json nor *{split}*.bin" in refusal(
        open_folder, tmp_path
    )


@each_split
def test_split_shorter_than_a_window_is_rejected(prepared, split):
    """A window has block_size + 1 tokens."""
    counts = META["counts"] | {split: 5}
    write_ids(prepared / f"{split}.bin", [0] * 5)
    change_meta(prepared, counts=counts)
    assert len(getattr(open_folder(prepared, block_size=4), split)) == 5
    message = refusal(open_folder, prepared, block_size=5)
    assert re.search(rf"{split}\.bin: holds 5 tokens, .* block_size=5; .* least 6", message)


def test_is_prepared_requires_a_bin_file_and_no_partial_file(tmp_path):
    folder = tmp_path / "some"
    assert not is_prepared(folder)
    folder.mkdir()
    assert not is_prepared(folder)
    for name in "input.txt", "train.bin.partial", "val.bin":
        (folder / name).touch()
        assert not is_prepared(folder)
    (folder / "train.bin.partial").unlink()
    assert is_prepared(folder)
