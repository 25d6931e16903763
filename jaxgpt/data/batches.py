"""Assemble the batch of each step without replacement, as a pure function of the seed and the step.

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

    If the tokens are `resident` on the device, the device gathers the windows. Otherwise a thread
    reads the windows from disk, for up to `ahead` calls in advance.
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
        self.tokens = tokens
        self.shape_UMB = shape_UMB
        self.block_size = block_size
        self._starts_of = partial(tokens.starts, block_size=block_size, seed=seed, stream=stream)
        self._sharding = NamedSharding(mesh, PartitionSpec(None, None, BATCH))
        self._resident = resident
        self._ahead = ahead

        def gather(tokens: jax.Array, starts_UMB: jax.Array) -> jax.Array:
            return tokens[starts_UMB[..., None] + jnp.arange(block_size + 1)]

        self._gather = jax.jit(gather, out_shardings=self._sharding)
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._pending: dict[int, Future] = {}

    def get(self, step: int) -> jax.Array:
        """Return the windows of the U steps from `step` on, [U, M, B, T + 1], over the mesh."""
        U = self.shape_UMB[0]
        pending = {}
        for later in range(step, step + (self._ahead + 1) * U, U):
            pending[later] = self._pending.get(later) or self._reader.submit(self._read, later)
        read = pending.pop(step).result()
        self._pending = pending
        return read if self._resident is None else self._gather(self._resident, read)

    def starts(self, step: int) -> np.ndarray:
        """Return where the windows of the U steps from `step` on start, int64 [U, M, B]."""
        U, M, B = self.shape_UMB
        sample_ids = np.arange(step * M * B, (step + U) * M * B, dtype=np.uint64)
        return self._starts_of(sample_ids).reshape(self.shape_UMB)

    def _read(self, step: int) -> jax.Array:
        """Put the windows on the mesh, or only their starts if the tokens are resident."""
        starts = self.starts(step)
        length = self.block_size + 1

        def read_windows(index: Any) -> np.ndarray:
            local_starts = starts[index[:3]]  # the sequences of one device
            windows = self.tokens.windows(local_starts.ravel(), length)
            return windows.reshape(*local_starts.shape, length)

        if self._resident is None:
            shape, read = (*self.shape_UMB, length), read_windows
        else:
            shape, read = self.shape_UMB, starts.astype(np.int32).__getitem__
        return jax.make_array_from_callback(shape, self._sharding, read)


def make_resident(tokens: TokenSplit, mesh: Mesh) -> jax.Array:
    """Copy all tokens of a split to every device."""
    ids = tokens.read(0, len(tokens))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(ids.shape, replicated, ids.__getitem__)
