"""How good a model is: estimates from random batches, and the loss of a whole split.

K batches of a dispatch, M micro-batches (here one), B sequences, T length.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import device, run_dir, sharding
from jaxgpt.data.batches import Batches
from jaxgpt.data.prepare import find_dataset
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokens import Tokens
from jaxgpt.sharding import BATCH
from jaxgpt.train_step import make_eval_step

DISPATCH = 20  # batches handed to the device in one call
PIECE = 1 << 20  # tokens decoded in one piece


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
    place = NamedSharding(mesh, PartitionSpec(None, None, BATCH))
    rows, targets = DISPATCH * sequences, len(tokens) - 1
    for first in range(0, targets, rows * block_size):
        starts = range(first, targets, block_size)[:rows]
        windows = np.full((rows, block_size + 1), -1, np.int32)
        for window, start in zip(windows, starts, strict=False):
            ids = tokens.read(start, min(block_size, targets - start) + 1)
            window[: len(ids)] = ids
        windows = windows.reshape(DISPATCH, 1, sequences, block_size + 1)
        batch = jax.make_array_from_callback(windows.shape, place, windows.__getitem__)
        yield {"windows": batch}, -(-len(starts) // sequences)


def evaluate(out_dir: str, checkpoint: str, data_dir: str = "", mesh: str = "") -> dict[str, Any]:
    """The loss of a run on its whole validation split, also as perplexity and bits a byte.

    Raises `UserError` if the run or its dataset is not there.
    """
    config = run_dir.load_config(out_dir)
    dataset = find_dataset(config.replace(data_dir=data_dir or config.data_dir), config.block_size)
    devices = sharding.make_mesh(config.replace(mesh=mesh))
    params, step = run_dir.load_params(config, checkpoint, devices)
    resolved, _ = device.resolve(config.replace(dropout=0.0))
    sequences = sharding.sequences(config) // sharding.micro_batches(config, devices)
    batches = whole_split(dataset.val, devices, sequences, config.block_size)
    loss = mean_loss(make_eval_step(resolved, devices), params, batches)
    found = {"step": step, "val_tokens": len(dataset.val), "val_loss": loss}
    found["perplexity"] = math.exp(loss)
    if dataset.tokenizer:
        bits = loss / math.log(2) * (len(dataset.val) - 1)
        found["bits_per_byte"] = bits / count_bytes(dataset.val, dataset.tokenizer)
    return found


def count_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that the targets of a split, all tokens but the first, stand for."""
    pieces = range(1, len(tokens), PIECE)
    return sum(
        len(tokenizer.decode(tokens.read(at, min(PIECE, len(tokens) - at))).encode())
        for at in pieces
    )
