"""Losses: estimates from random batches, and the exact loss of a whole split.

U batches per call, M = 1 micro-batch, B sequences per batch, T length.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import sharding
from jaxgpt.config import Config
from jaxgpt.data import batch_size
from jaxgpt.data.batches import Batches
from jaxgpt.data.tokens import TokenSplit
from jaxgpt.train_step import make_eval_step

BATCHES_PER_CALL = 20


class Evaluator:
    """Computes the losses of a run on its train split and its val split."""

    def __init__(self, config: Config, mesh: Mesh, train: Batches, val: Batches):
        self.config, self.mesh, self.splits = config, mesh, {"train": train, "val": val}
        self.num_batches, _ = batch_size.eval_batches_and_size(config, mesh)
        self.eval_step = make_eval_step(config, mesh)

    def losses(self, params: dict[str, Any], step: int) -> dict[str, float]:
        """Return both losses, from `eval_iters` random batches each, or exact if that is 0."""
        if not self.config.eval_iters:
            return {f"{name}_loss": self.full_loss(params, name) for name in self.splits}
        losses = {}
        for name, batches in self.splits.items():
            sampled = random_batches(batches, step, self.num_batches)
            losses[f"{name}_loss"] = mean_loss(self.eval_step, params, sampled)
        return losses

    def full_loss(self, params: dict[str, Any], split: str = "val") -> float:
        """Return the exact loss of a whole split, in nats per token."""
        b = self.splits[split]
        calls = full_split(b.tokens, self.mesh, b.shape_UMB[2], b.block_size)
        return mean_loss(self.eval_step, params, calls)


def mean_loss(
    eval_step: Callable, params: dict[str, Any], calls: Iterable[tuple[jax.Array, int]]
) -> float:
    """Return the mean cross-entropy in nats per target over calls.

    A call is (windows [U, 1, B, T + 1], count); batches after the first `count` are ignored.
    """
    sums = []
    for windows_UMBT, count in calls:
        sums.append(eval_step(params, windows_UMBT, count))
        if len(sums) > 1:
            jax.block_until_ready(sums[-2])  # many queued calls deadlock the devices of a CPU
    total, targets = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return float(total / targets) if targets else math.nan


def random_batches(batches: Batches, step: int, count: int) -> Iterator[tuple[jax.Array, int]]:
    """Yield `count` random batches, several per call; they depend only on the training step."""
    first = step * count
    for done in range(0, count, BATCHES_PER_CALL):
        yield batches.get(first + done), min(BATCHES_PER_CALL, count - done)


def full_split(
    tokens: TokenSplit, mesh: Mesh, sequences: int, block_size: int
) -> Iterator[tuple[jax.Array, int]]:
    """Yield a split in calls, so that every token but the first is a target exactly once.

    Windows follow each other without overlap. The last window and the last batch are padded
    with -1, which is never a target.
    """
    batch_sharding = NamedSharding(mesh, PartitionSpec(None, None, sharding.BATCH))
    rows, targets = BATCHES_PER_CALL * sequences, len(tokens) - 1
    for first in range(0, targets, rows * block_size):
        starts = range(first, targets, block_size)[:rows]
        windows = np.full((rows, block_size + 1), -1, np.int32)
        for window, start in zip(windows, starts, strict=False):
            ids = tokens.read(start, min(block_size, targets - start) + 1)
            window[: len(ids)] = ids
        windows = windows.reshape(BATCHES_PER_CALL, 1, sequences, block_size + 1)
        array = jax.make_array_from_callback(windows.shape, batch_sharding, windows.__getitem__)
        yield array, math.ceil(len(starts) / sequences)
