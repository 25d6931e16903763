"""(seed, step) -> the batch, without replacement: gathered on the device, or read ahead from disk.

A batch is one array `windows_UMBT`: U steps per call, M micro-batches per step, B sequences per
micro-batch, and T + 1 tokens, because the last target follows the last input.
"""

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
    """The batches of one stream, each a pure function of its step.

    The device gathers windows of `resident` tokens; a thread reads others, `ahead` calls early.
    """

    def __init__(
        self,
        tokens: TokenSplit,
        mesh: Mesh,
        shape_UMB: tuple[int, int, int],
        *,
        block_size: int,
        seed: int,
        stream: int,
        resident: jax.Array | None = None,
        ahead: int = 0,
    ):
        self.tokens, self.shape_UMB, self.block_size = tokens, shape_UMB, block_size
        self._starts = partial(tokens.starts, block_size=block_size, seed=seed, stream=stream)
        self._sharding = NamedSharding(mesh, PartitionSpec(None, None, BATCH))
        self._resident, self._ahead = resident, ahead

        def gather(tokens: jax.Array, starts_UMB: jax.Array) -> jax.Array:
            return tokens[starts_UMB[..., None] + jnp.arange(block_size + 1)]

        self._gather = jax.jit(gather, out_shardings=self._sharding)
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._pending: dict[int, Future] = {}

    def get(self, step: int) -> jax.Array:
        """Returns the windows of the U steps from `step` on, [U, M, B, T + 1], over the mesh."""
        U = self.shape_UMB[0]
        pending = {}
        for later in range(step, step + (self._ahead + 1) * U, U):
            pending[later] = self._pending.get(later) or self._reader.submit(self._read, later)
        made = pending.pop(step).result()
        self._pending = pending
        return made if self._resident is None else self._gather(self._resident, made)

    def starts(self, step: int) -> np.ndarray:
        """Returns where the windows of the U steps from `step` on start, int64 [U, M, B]."""
        U, M, B = self.shape_UMB
        sample_ids = np.arange(step * M * B, (step + U) * M * B, dtype=np.uint64)
        return self._starts(sample_ids).reshape(self.shape_UMB)

    def _read(self, step: int) -> jax.Array:
        """Puts the windows on the mesh, or where the tokens are resident, only their starts."""
        starts, length = self.starts(step), self.block_size + 1

        def read(index: Any) -> np.ndarray:
            mine = starts[index[:3]]  # the sequences of one device
            return self.tokens.windows(mine.ravel(), length).reshape(*mine.shape, length)

        shape, part = (*self.shape_UMB, length), read
        if self._resident is not None:
            shape, part = self.shape_UMB, starts.astype(np.int32).__getitem__
        return jax.make_array_from_callback(shape, self._sharding, part)


def make_resident(tokens: TokenSplit, mesh: Mesh) -> jax.Array:
    """Copies all tokens of a split to every device."""
    ids = tokens.read(0, len(tokens))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(ids.shape, replicated, ids.__getitem__)
