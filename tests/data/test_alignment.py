"""Test align_documents: which windows start at documents, their order, and the cache of starts."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import log_of, make_data, refusal, rows_of, state_of, stop_at, tiny_run
from hypothesis import example, given
from hypothesis import strategies as st
from test_tokens import open_folder, write_ids, write_shard

from jaxgpt.data import alignment
from jaxgpt.data.alignment import align, choose_windows, document_starts
from jaxgpt.data.tokens import AlignedSplit, Dataset, TokenSplit
from jaxgpt.train import train

EOT = 9
SEEDS = st.integers(0, 2**63)
IDS = st.lists(st.integers(0, EOT), min_size=2, max_size=200)  # one id in ten ends a document


def one_by_one(ids: list[int], block_size: int) -> list[int]:
    """Choose the windows by reading the ids from left to right."""
    chosen, position = [], 0
    while position + block_size < len(ids):
        if ids[position] == EOT:
            chosen.append(position)
            position += block_size
        else:
            position += 1
    return chosen


@given(IDS, st.integers(1, 20))
@example([EOT] * 50, 1)
@example([EOT] * 50, 7)
@example([0] * 50, 7)
@example([EOT, 0, 0], 2)  # exactly one window
@example([EOT, 0, 0], 3)  # one token too few
def test_windows_start_at_documents_and_share_no_target(ids, block_size):
    starts = np.flatnonzero(np.array(ids) == EOT)
    windows = choose_windows(starts, len(ids), block_size)
    assert windows.dtype == np.int64
    assert windows.tolist() == one_by_one(ids, block_size)


def split_of(windows: np.ndarray, folder: Path) -> AlignedSplit:
    ids = np.arange(windows.max() + 10)
    return AlignedSplit(TokenSplit([write_ids(folder / "a.bin", ids)], "uint16", 2**16), windows)


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=300), SEEDS, st.integers(0, 9))
def test_each_epoch_has_each_window_once_and_depends_only_on_the_sample(
    tmp_path_factory, windows, seed, stream
):
    """A resumed run therefore gets the same windows as an uninterrupted run."""
    windows = np.array(sorted(windows))
    split, count = split_of(windows, tmp_path_factory.mktemp("split")), len(windows)
    keys = {"block_size": 8, "seed": seed, "stream": stream}
    order = split.starts(np.arange(3 * count, dtype=np.uint64), **keys)
    assert order.dtype == np.int64
    for epoch in np.split(order, 3):
        np.testing.assert_array_equal(np.sort(epoch), windows)
    resumed = split.starts(np.arange(count // 2, 2 * count, dtype=np.uint64), **keys)
    np.testing.assert_array_equal(resumed, order[count // 2 : 2 * count])


def test_seeds_streams_and_epochs_have_different_orders(tmp_path):
    split = split_of(np.arange(0, 3000, 30), tmp_path)
    epochs = np.arange(300, dtype=np.uint64).reshape(3, 100)
    orders = {
        tuple(split.starts(samples, block_size=8, seed=seed, stream=stream))
        for samples in epochs for seed in range(3) for stream in range(3)
    }  # fmt: skip
    assert len(orders) == 27


def dataset_of(folder: Path, *parts: list[int], dtype: str = "uint16") -> Dataset:
    files = [write_ids(folder / f"train_{i}.bin", ids, dtype) for i, ids in enumerate(parts)]
    train = TokenSplit(files, dtype, EOT + 1)
    return Dataset(train, train, EOT + 1, None, "", {"counts": len(train)})


@given(parts=st.lists(IDS, min_size=1, max_size=4), block_size=st.integers(1, 20))
def test_windows_of_several_files_start_at_the_end_of_text_and_are_slices(
    tmp_path_factory, parts, block_size
):
    """A negative id is a masked token, which ends no document."""
    parts = [[~id if i % 7 == 3 else id for i, id in enumerate(part)] for part in parts]
    whole = np.concatenate(parts)
    folder = tmp_path_factory.mktemp("split")
    split = align(dataset_of(folder, *parts, dtype="int32"), EOT, block_size)
    assert split.window_starts.tolist() == one_by_one(whole.tolist(), block_size)
    if len(split.window_starts):
        samples = np.arange(9, dtype=np.uint64)
        starts = split.starts(samples, block_size=block_size, seed=1, stream=0)
        windows = split.windows(starts, block_size + 1)
        assert (windows[:, 0] == EOT).all()
        expected = [whole[start : start + block_size + 1] for start in starts]
        np.testing.assert_array_equal(windows, expected)


@pytest.mark.parametrize("eot_first", [True, False])
def test_end_of_text_before_or_after_each_document_starts_it(tmp_path, no_gpt2, eot_first):
    """llm.c writes the end-of-text before each document, jaxgpt writes it after."""
    documents = [[1, 2, 3], [4, 5, 6, 7], [8, 1, 2, 3]]
    ids = np.concatenate([[EOT, *text] if eot_first else [*text, EOT] for text in documents])
    for name in "train", "val":
        write_shard(tmp_path / f"{name}.bin", ids)
    split = align(open_folder(tmp_path, block_size=2), EOT, block_size=4)
    windows = split.windows(split.window_starts, 5).tolist()
    assert windows == [[EOT, 1, 2, 3, EOT], [EOT, 4, 5, 6, 7], [EOT, 8, 1, 2, 3]][not eot_first :]


def test_document_starts_are_found_once_and_kept_beside_the_data(tmp_path, monkeypatch):
    data = dataset_of(tmp_path, [EOT, 1, EOT], [EOT, 1, 2])
    scans, find = [], TokenSplit.positions_of

    def counted(self, id):
        scans.append(id)
        return find(self, id)

    monkeypatch.setattr(TokenSplit, "positions_of", counted)
    for _ in range(3):
        assert document_starts(data, EOT).tolist() == [0, 2, 3]
    assert scans == [EOT]
    assert document_starts(data, 1).tolist() == [1, 4]  # another end-of-text
    assert scans == [EOT, 1]
    write_ids(data.train.files[1], [1, EOT, 2])  # other tokens, as many as before
    os.utime(data.train.files[1], ns=(1, 1))
    assert document_starts(data, 1).tolist() == [1, 3]
    (tmp_path / alignment.CACHE).write_bytes(b"damaged")
    assert document_starts(data, EOT).tolist() == [0, 2, 4]
    (tmp_path / alignment.CACHE).write_bytes(b"")
    assert document_starts(data, EOT).tolist() == [0, 2, 4]
    assert len(scans) == 5
    assert [path.name for path in tmp_path.glob("*.npz")] == [alignment.CACHE]


def test_document_starts_are_kept_in_memory_if_the_folder_is_read_only(tmp_path, monkeypatch):
    def refuse(*args, **keys):
        raise PermissionError

    monkeypatch.setattr(alignment, "atomic_path", refuse)
    assert document_starts(dataset_of(tmp_path, [1, EOT, 1]), EOT).tolist() == [1]
    assert not (tmp_path / alignment.CACHE).exists()


# ---- runs ------------------------------------------------------------------------------------

NEWLINE = 0  # the end-of-text of these runs: a line is a document


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    lines = [f"{'so foul and fair a day '[: 5 + i % 19]}\n" for i in range(300)]
    return make_data(tmp_path_factory.mktemp("data"), "".join(lines))


@pytest.fixture
def make_run(tmp_path, data_dir):
    keys = {"align_documents": True, "eot_id": NEWLINE, "max_iters": 16}
    return lambda name="run", **more: tiny_run(tmp_path / name, data_dir, **keys | more)


@pytest.mark.slow
def test_aligned_run_resumes_exactly_on_other_devices_and_with_data_on_the_host(
    make_run, monkeypatch
):
    quiet, plain = make_run("quiet"), make_run("plain", align_documents=False)
    train(quiet)
    train(plain)
    assert "align_documents: an epoch has " in log_of(quiet)
    evaluations = lambda config: [row for row in rows_of(config) if "val_loss" in row]
    assert evaluations(plain)[0] == evaluations(quiet)[0], "evaluations are not aligned"
    assert rows_of(plain)[1] != rows_of(quiet)[1]
    stopped = make_run("stopped", init_from="auto")
    stop_at(monkeypatch, 3, 10)
    for _ in range(3):
        train(stopped)
    assert rows_of(stopped) == rows_of(quiet)
    assert state_of(stopped, 16) == state_of(quiet, 16)
    other = make_run("other", mesh="data:4", data_on_device="never")
    train(other)
    for ours, theirs in zip(rows_of(other), rows_of(quiet), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"eot_id": -1}, "the tokenizer of dataset='tale' has no end-of-text token, or is unknown; "
                         "expected an end-of-text; try --eot_id=ID, the id between two documents"),
        ({"eot_id": 50, "vocab_size": 60},
         "the train split of dataset='tale' has no end-of-text (id 50) that block_size=8 tokens "
         "follow; expected at least one; try a smaller"),
        ({"dataset": "adder", "digits": 1}, "dataset='adder' has problems and no documents; try "),
    ],
)  # fmt: skip
def test_data_without_documents_is_rejected_before_the_run_begins(make_run, keys, said):
    config = make_run(**keys)
    assert f"align_documents=True: {said}" in refusal(train, config)
    assert not Path(config.out_dir, "config.json").exists()
