"""(seed, step) -> the batch: an order without replacement, gathered on the device or read ahead.

K steps of a dispatch, M micro-batches of a step, B sequences of a micro-batch, T length.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.data.tokens import Tokens
from jaxgpt.sharding import BATCH

ROUNDS = 6  # of the Feistel network


def window_starts(
    samples: np.ndarray, *, num_tokens: int, block_size: int, seed: int, stream: int
) -> np.ndarray:
    """Where the windows of the samples with these running numbers start, int64.

    A window is `block_size` tokens and one more for the last target. An epoch is a permutation
    of windows that tile the tokens, all shifted by one random offset, so no token is trained on
    twice before every window has been. Both are drawn from (seed, stream, epoch): the place of a
    sample is a pure function of its number, and a resumed run needs to remember nothing.
    """
    tiles = (num_tokens - 1) // block_size
    windows = max(1, tiles - 1)  # one fewer leaves room to shift by any offset
    room = num_tokens - windows * block_size  # offsets: the last one reaches the last token
    epochs, positions = np.divmod(samples.astype(np.uint64), np.uint64(windows))
    keys = _mix(_mix(_mix(np.full_like(epochs, seed)) + np.uint64(stream)) + epochs)
    offsets = _mix(keys) % np.uint64(room)
    return (offsets + permute(positions, windows, keys) * np.uint64(block_size)).astype(np.int64)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The place of each `index` in a pseudo-random permutation of range(size), one a key.

    A Feistel network (Luby & Rackoff 1988) permutes the next power of four; walking its cycle
    until the value falls below `size` permutes the range itself (Black & Rogaway 2002).
    """
    bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)

    def shuffle(value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = value >> bits, value & mask
        for round in range(ROUNDS):
            left, right = right, left ^ (_mix(right + _mix(keys + np.uint64(round))) & mask)
        return left << bits | right

    place = shuffle(index.astype(np.uint64), keys)
    while (outside := place >= size).any():
        place[outside] = shuffle(place[outside], keys[outside])
    return place


def _mix(x: np.ndarray) -> np.ndarray:
    """A good 64-bit hash of each number: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Batches:
    """The batches of one stream: pure functions of a step, as arrays on the mesh.

    Where the tokens are `resident` on the device, a batch is {"tokens": [all], "starts":
    [K, M, B]}; else it is {"windows": [K, M, B, T + 1]}, read from disk by a thread, `ahead`
    dispatches early. `gather` turns either into windows inside the jitted step.
    """

    def __init__(
        self,
        tokens: Tokens,
        mesh: Mesh,
        shape_KMB: tuple[int, int, int],
        *,
        block_size: int,
        seed: int,
        stream: int,
        resident: jax.Array | None = None,
        ahead: int = 0,
    ):
        self.tokens, self.shape_KMB, self.block_size = tokens, shape_KMB, block_size
        self._place = partial(
            window_starts, num_tokens=len(tokens), block_size=block_size, seed=seed, stream=stream
        )
        self._sharding = NamedSharding(mesh, PartitionSpec(None, None, BATCH))
        self._resident, self._ahead = resident, ahead
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._futures: dict[int, Future] = {}

    def take(self, step: int) -> dict[str, jax.Array]:
        """The batches of the K steps from `step` on."""
        K = self.shape_KMB[0]
        steps = range(step, step + (self._ahead + 1) * K, K)
        old = self._futures
        self._futures = {s: old.get(s) or self._reader.submit(self._make, s) for s in steps}
        return self._futures.pop(step).result()

    def starts(self, step: int) -> np.ndarray:
        """Where the windows of the K steps from `step` on start, int64 [K, M, B]."""
        K, M, B = self.shape_KMB
        samples = np.arange(step * M * B, (step + K) * M * B, dtype=np.uint64)
        return self._place(samples).reshape(self.shape_KMB)

    def _make(self, step: int) -> dict[str, jax.Array]:
        starts, length = self.starts(step), self.block_size + 1
        if self._resident is not None:
            return {
                "tokens": self._resident,
                "starts": self._put(starts.astype(np.int32).__getitem__),
            }

        def read(index: tuple[slice, ...]) -> np.ndarray:
            mine = starts[index[:3]]  # the sequences of one device
            rows = [self.tokens.read(int(start), length) for start in mine.flat]
            return np.stack(rows).reshape(*mine.shape, length)

        return {"windows": self._put(read, length)}

    def _put(self, part: Callable[[Any], np.ndarray], *shape: int) -> jax.Array:
        return jax.make_array_from_callback((*self.shape_KMB, *shape), self._sharding, part)


def make_resident(tokens: Tokens, mesh: Mesh) -> jax.Array:
    """All tokens of a split, whole on every device."""
    ids = tokens.read(0, len(tokens))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(ids.shape, everywhere, ids.__getitem__)


def gather(batch: dict[str, jax.Array], step: jax.Array | int, length: int) -> jax.Array:
    """The windows of one of the K steps in a batch, int32 [M, B, `length`]."""
    if "windows" in batch:
        return batch["windows"][step].astype(jnp.int32)
    places = batch["starts"][step][..., None] + jnp.arange(length)
    return batch["tokens"][places].astype(jnp.int32)
