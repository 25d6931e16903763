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

from jaxgpt.data.tokens import TokenSplit
from jaxgpt.sharding import BATCH


class Batches:
    """The batches of one stream: pure functions of a step, as arrays on the mesh.

    Where the tokens are `resident` on the device, a batch is {"tokens": [all], "starts":
    [K, M, B]}; else it is {"windows": [K, M, B, T + 1]}, read from disk by a thread, `ahead`
    dispatches early. `gather` turns either into windows inside the jitted step.
    """

    def __init__(
        self,
        tokens: TokenSplit,
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
        self._starts = partial(tokens.starts, block_size=block_size, seed=seed, stream=stream)
        self._sharding = NamedSharding(mesh, PartitionSpec(None, None, BATCH))
        self._resident, self._ahead = resident, ahead
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._futures: dict[int, Future] = {}

    def get(self, step: int) -> dict[str, jax.Array]:
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
        return self._starts(samples).reshape(self.shape_KMB)

    def _make(self, step: int) -> dict[str, jax.Array]:
        starts, length = self.starts(step), self.block_size + 1
        if self._resident is not None:
            return {
                "tokens": self._resident,
                "starts": self._put(starts.astype(np.int32).__getitem__),
            }

        def read(index: tuple[slice, ...]) -> np.ndarray:
            mine = starts[index[:3]]  # the sequences of one device
            return self.tokens.windows(mine.ravel(), length).reshape(*mine.shape, length)

        return {"windows": self._put(read, length)}

    def _put(self, part: Callable[[Any], np.ndarray], *shape: int) -> jax.Array:
        return jax.make_array_from_callback((*self.shape_KMB, *shape), self._sharding, part)


def make_resident(tokens: TokenSplit, mesh: Mesh) -> jax.Array:
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
