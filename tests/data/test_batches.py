"""Test the data order, batches against NumPy slices, and the pass over a full split.

U steps per call, M micro-batches per step, B sequences per micro-batch, T length.
"""

import threading
import time
from functools import partial

import jax
import numpy as np
import pytest
from helpers import refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt import evaluate
from jaxgpt.config import Config
from jaxgpt.data.batches import Batches, make_resident
from jaxgpt.data.order import permute, window_starts
from jaxgpt.data.tokens import TokenSplit
from jaxgpt.runtime.mesh import make_mesh

KEYS = st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**63)
MESHES = ["data:1", "data:2", "data:4,fsdp:2", "fsdp:2,tensor:2"]


def permuted(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size), size, np.full(size, key, np.uint64))


@given(st.integers(1, 3000), KEYS)
@example(1, 0)
@example(2**10, 2**64 - 1)
@example(2**11, 1)
@example(2**12 + 1, 1)
def test_permute_is_a_bijection(size, key):
    np.testing.assert_array_equal(np.sort(permuted(size, key)), np.arange(size))


@pytest.mark.parametrize("size", [64, 100])  # a power of four, which needs no walk, and another
@given(pairs=st.lists(st.tuples(st.integers(0, 63), KEYS), min_size=1))
def test_permute_applies_one_key_per_index(size, pairs):
    indices, keys = np.array([i for i, _ in pairs]), np.array([k for _, k in pairs], np.uint64)
    expected = [permuted(size, key)[i] for i, key in pairs]
    np.testing.assert_array_equal(permute(indices, size, keys), expected)


@given(st.integers(2**30, 2**50), KEYS)
def test_permute_of_a_huge_range_is_one_to_one(size, key):
    indices = np.concatenate([np.arange(500), np.arange(size - 500, size)])
    positions = permute(indices, size, np.full(1000, key, np.uint64))
    assert len(set(positions.tolist())) == 1000
    assert positions.max() < size
    assert np.abs(np.mean(positions / size) - 0.5) < 0.1  # ten standard deviations


@pytest.mark.parametrize("size", [2, 5, 16])
def test_permuted_positions_are_uniform_over_keys(size):
    """With 20,000 keys, six rounds over a range of 16 leave the counts some 8% apart."""
    keys = np.repeat(np.arange(20_000, dtype=np.uint64), size)
    positions = permute(np.tile(np.arange(size), 20_000), size, keys).reshape(-1, size)
    counts = np.array([np.bincount(column, minlength=size) for column in positions.T.astype(int)])
    np.testing.assert_allclose(counts, 20_000 / size, rtol=0.15)


def windows_in(num_tokens: int, block_size: int) -> int:
    """Return the number of windows per epoch: one fewer than fit the tokens, but at least one."""
    return max(1, (num_tokens - 1) // block_size - 1)


def starts_of(samples, num_tokens: int, block_size: int, seed: int = 0, stream: int = 0):
    sizes = {"num_tokens": num_tokens, "block_size": block_size}
    return window_starts(np.asarray(samples), **sizes, seed=seed, stream=stream)


def epoch(number: int, num_tokens: int, block_size: int, seed: int = 0, stream: int = 0):
    """Return the starts of all windows of an epoch, in order."""
    count = windows_in(num_tokens, block_size)
    samples = np.arange(number * count, (number + 1) * count)
    return starts_of(samples, num_tokens, block_size, seed, stream)


TOKENS = lambda block: st.tuples(st.integers(block + 1, 30 * block + 30), st.just(block))
SIZES = st.integers(1, 40).flatmap(TOKENS)


@given(SIZES, SEEDS, st.integers(0, 9), st.integers(0, 2**40))
@example((2, 1), 0, 0, 0)
@example((41, 40), 0, 0, 0)
@example((80, 40), 0, 0, 7)
@example((81, 40), 0, 0, 7)
@example((121, 40), 0, 0, 7)
def test_epoch_windows_tile_the_tokens_without_overlap(sizes, seed, stream, number):
    """Windows are adjacent, so no target appears twice and no window leaves the tokens."""
    num_tokens, block_size = sizes
    starts = epoch(number, num_tokens, block_size, seed, stream)
    assert starts.dtype == np.int64
    tiles = np.sort(starts)
    np.testing.assert_array_equal(np.diff(tiles), block_size)
    assert 0 <= tiles[0] <= tiles[-1] <= num_tokens - block_size - 1
    assert num_tokens - 1 - len(tiles) * block_size < 2 * block_size  # targets left for later


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 30), SEEDS)
@example(4, 7, 0)
def test_every_token_becomes_a_target_in_some_epoch(block_size, more, seed):
    num_tokens = block_size + 1 + more
    samples = np.arange(500 * windows_in(num_tokens, block_size))
    starts = starts_of(samples, num_tokens, block_size, seed)
    seen = np.unique(starts[:, None] + np.arange(1, block_size + 1))
    np.testing.assert_array_equal(seen, np.arange(1, num_tokens))


@pytest.mark.parametrize("what", ["number", "seed", "stream"])
def test_epoch_seed_and_stream_each_change_order_and_offset(what):
    orders, offsets = set(), set()
    for value in range(40):
        starts = epoch(**{"number": 0, "num_tokens": 3001, "block_size": 30} | {what: value})
        orders.add(tuple(starts // 30))
        offsets.add(starts[0] % 30)
    assert len(orders) == 40
    assert len(offsets) > 15  # of 30, by chance
    # The orders are not rotations of a single order, and no order has a constant stride.
    strides = {tuple(np.diff(order) % len(order)) for order in orders}
    assert len(strides) == 40
    assert all(len(set(stride)) > 30 for stride in strides)


def test_epoch_seed_and_stream_are_not_interchangeable():
    """Seed 1 of stream 0 must give another order than seed 0 of stream 1."""
    triples = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1), (2, 0, 0)]
    orders = {tuple(epoch(n, 3001, 30, seed, stream)) for n, seed, stream in triples}
    assert len(orders) == len(triples)


@given(SIZES, SEEDS, st.lists(st.integers(0, 500), min_size=1))
def test_window_start_depends_only_on_the_sample_number(sizes, seed, samples):
    """A resumed run therefore gets the same windows as an uninterrupted run."""
    in_order = starts_of(np.arange(501), *sizes, seed, 1)
    np.testing.assert_array_equal(starts_of(samples, *sizes, seed, 1), in_order[samples])
    np.testing.assert_array_equal(starts_of(samples[:1], *sizes, seed, 1), in_order[samples[:1]])


@given(st.integers(2**40, 2**42), st.integers(1, 2**12), SEEDS)
def test_huge_datasets_have_distinct_aligned_windows_in_range(num_tokens, block_size, seed):
    count = windows_in(num_tokens, block_size)
    samples = np.concatenate([np.arange(300), np.arange(count - 300, count)]) + 5 * count
    starts = starts_of(samples, num_tokens, block_size, seed)
    assert len(set(starts.tolist())) == 600
    assert len(set((starts % block_size).tolist())) == 1
    assert 0 <= starts.min() <= starts.max() <= num_tokens - block_size - 1


T = 7
make = partial(Batches, block_size=T, seed=5, stream=2)


def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh(Config(mesh=name))


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def ids(request):
    top = 2**16 if request.param == "uint16" else 2**31 - 1
    return np.random.default_rng(0).integers(0, top, 999).astype(request.param)


def tokens_of(ids: np.ndarray, folder, kind: type[TokenSplit] = TokenSplit) -> TokenSplit:
    """Write `ids` to three files; return the split that reads the files."""
    files = [folder / f"{i}.bin" for i in range(3)]
    for file, part in zip(files, np.split(ids, [100, 350]), strict=True):
        part.tofile(file)
    return kind(files, ids.dtype.name, int(ids.max()) + 1)


def windows_of(ids: np.ndarray, step: int, shape_UMB: tuple[int, int, int]) -> np.ndarray:
    """Return windows [U, M, B, T + 1] of consecutive samples, from the first sample of `step`."""
    U, M, B = shape_UMB
    starts = starts_of(np.arange(step * M * B, (step + U) * M * B), len(ids), T, 5, 2)
    return np.stack([ids[start : start + T + 1] for start in starts]).reshape(U, M, B, T + 1)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", MESHES)
def test_batches_equal_id_slices_and_are_sharded_by_sequence(tmp_path, ids, name, resident):
    mesh, tokens = mesh_of(name), tokens_of(ids, tmp_path)
    held = make_resident(tokens, mesh) if resident else None
    for shard in held.addressable_shards if resident else ():
        np.testing.assert_array_equal(shard.data, ids)
    per_device = 8 // (mesh.shape["data"] * mesh.shape["fsdp"])
    for shape in ((2, 3, 8), (1, 3, 8)):  # a batch of U steps is U batches
        batches = make(tokens, mesh, shape, resident=held)
        for step in (0, 2, 50):
            batch = batches.get(step)
            assert batch.dtype == ids.dtype
            np.testing.assert_array_equal(batch, windows_of(ids, step, shape))
            for shard in batch.addressable_shards:
                assert shard.data.shape == (*shape[:2], per_device, T + 1)
            assert len({s.device for s in batch.addressable_shards}) == mesh.size


class Watched(TokenSplit):
    """A split that counts its reads and waits for `go` before each read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.reads, self.go = 0, threading.Event()
        self.go.set()

    def read(self, start: int, length: int) -> np.ndarray:
        assert self.go.wait(60)
        self.reads += 1
        return super().read(start, length)

    def settled(self, expected: int) -> int:
        """Wait for the expected number of reads and a moment more; return the number of reads."""
        deadline = time.monotonic() + 30
        while self.reads < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        return self.reads


@pytest.mark.parametrize("ids", ["uint16"], indirect=True)
def test_batches_are_prefetched_without_repeated_reads(tmp_path, ids):
    U, M, B = shape = (2, 1, 4)
    tokens = tokens_of(ids, tmp_path, Watched)
    batches = make(tokens, mesh_of("data:1"), shape, ahead=2)
    taken = 0
    # Steps in order, a jump ahead, a jump back, and a step that is partly prefetched.
    for step, fresh in ((0, 3), (2, 1), (4, 1), (50, 3), (10, 3), (14, 2)):
        np.testing.assert_array_equal(batches.get(step), windows_of(ids, step, shape))
        taken += fresh * U * M * B
        assert tokens.settled(taken) == taken
    tokens.go.clear()
    np.testing.assert_array_equal(batches.get(16), windows_of(ids, 16, shape))
    assert tokens.reads == taken  # the next batch was there already
    tokens.go.set()


@pytest.mark.parametrize("ids", ["uint16"], indirect=True)
def test_out_of_range_id_is_rejected_by_get_and_make_resident(tmp_path, ids):
    tokens = tokens_of(ids, tmp_path)
    tokens.vocab_size = 1
    batches = make(tokens, mesh_of("data:1"), (1, 1, 1), ahead=1)
    assert "expected ids below vocab_size=1;" in refusal(batches.get, 0)
    assert "expected ids below vocab_size=1;" in refusal(make_resident, tokens, mesh_of("data:1"))


SPLITS = st.tuples(st.integers(2, 200), st.integers(1, 9), st.sampled_from(MESHES))


@settings(max_examples=40)
@given(split=SPLITS, share=st.integers(1, 2), dispatch=st.integers(1, 3))
@example(split=(2, 9, "data:1"), share=1, dispatch=3)
@example(split=(17, 4, "data:2"), share=1, dispatch=2)  # all windows full
@example(split=(18, 4, "data:2"), share=1, dispatch=2)  # one target more
@example(split=(16, 4, "data:2"), share=1, dispatch=2)  # one less
def test_full_split_yields_every_target_exactly_once(tmp_path_factory, split, share, dispatch):
    num_tokens, T, name = split
    file = tmp_path_factory.mktemp("split") / "val.bin"
    np.arange(num_tokens, dtype=np.uint16).tofile(file)  # an id is its own position
    mesh = mesh_of(name)
    sequences, seen = share * mesh.shape["data"] * mesh.shape["fsdp"], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "BATCHES_PER_CALL", dispatch)
        tokens = TokenSplit([file], "uint16", num_tokens)
        batches = list(evaluate.full_split(tokens, mesh, sequences, T))
    for batch, count in batches:
        assert batch.shape == (dispatch, 1, sequences, T + 1)
        for shard in batch.addressable_shards:
            assert shard.data.shape[2] == share
        windows = np.asarray(batch)
        inputs, targets = windows[:count, ..., :-1], windows[:count, ..., 1:]
        real = targets != -1
        np.testing.assert_array_equal(inputs[real] + 1, targets[real])
        assert (inputs[..., 0] >= 0).any(axis=(1, 2)).all()  # no counted batch is empty
        assert (windows[count:] == -1).all()
        seen += targets[real].tolist()
    assert seen == list(range(1, num_tokens))
    assert len(batches) == -(-(num_tokens - 1) // (dispatch * sequences * T))
