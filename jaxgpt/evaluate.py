"""How good a model is: estimates from random batches, and the loss of a whole split.

K batches of a dispatch, M micro-batches (here one), B sequences, T length.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.data.batches import Batches
from jaxgpt.data.tokens import Tokens
from jaxgpt.sharding import BATCH

DISPATCH = 20  # batches handed to the device in one call


def mean_loss(
    eval_step: Callable, params: dict[str, Any], batches: Iterable[tuple[dict, int]]
) -> float:
    """Mean cross-entropy in nats a token; of each K batches only the number beside them count."""
    sums = [eval_step(params, batch, count) for batch, count in batches]
    total, targets = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return float(total / targets)


def random_batches(batches: Batches, step: int, count: int) -> Iterator[tuple[dict, int]]:
    """`count` batches that are a pure function of the training step they are drawn at."""
    first = step * count
    for done in range(0, count, DISPATCH):
        yield batches.take(first + done), min(DISPATCH, count - done)


def whole_split(
    tokens: Tokens, mesh: Mesh, sequences: int, block_size: int
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Batches in which every token of a split but the first is a target exactly once.

    Windows follow each other without overlap. The last window, and the last batch, are filled up
    with ids of -1, which count for nothing.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, None, BATCH))
    rows, targets = DISPATCH * sequences, len(tokens) - 1
    for first in range(0, targets, rows * block_size):
        starts = range(first, targets, block_size)[:rows]
        windows = np.full((rows, block_size + 1), -1, np.int32)
        for window, start in zip(windows, starts, strict=False):
            ids = tokens.read(start, min(block_size, targets - start) + 1)
            window[: len(ids)] = ids
        windows = windows.reshape(DISPATCH, 1, sequences, block_size + 1)
        batch = jax.make_array_from_callback(windows.shape, sharding, windows.__getitem__)
        yield {"windows": batch}, -(-len(starts) // sequences)
