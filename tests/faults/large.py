"""Time the reader of a dataset of many shards, and check its order at the ends of epochs."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.batches import Batches
from jaxgpt.data.tokens import TokenSplit, open_dataset
from jaxgpt.runtime.mesh import local_mesh

SHARD_TOKENS = 100_000_000
BLOCK_SIZE, WINDOWS_PER_STEP = 8192, 8
VOCAB_SIZE = 50_000  # unlike GPT-2's, needs no tokenizer
READ_S = 20.0


def read_large(folder: Path, tokens: int) -> bool:
    """Make sparse shards in `folder` and read random windows; print figures, and return success."""
    folder.mkdir()
    for number in range(max(1, tokens // SHARD_TOKENS)):
        _make_sparse(folder / f"train_{number:06}.bin", SHARD_TOKENS)
    _make_sparse(folder / "val_000000.bin", 2 * BLOCK_SIZE)
    before, began = private_mb(), time.perf_counter()
    train = open_dataset(folder, folder, BLOCK_SIZE, VOCAB_SIZE).train
    opened_s = time.perf_counter() - began
    keys: dict[str, Any] = {"block_size": BLOCK_SIZE, "seed": 0, "stream": 0, "ahead": 2}
    batches = Batches(train, local_mesh(), (1, 1, WINDOWS_PER_STEP), **keys)
    print(f"{len(train):,} tokens in {len(train.files)} shards: opened in {opened_s:.2f} s")
    began, cpu_began, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + READ_S:
        batches.get(steps).block_until_ready()
        steps += 1
    tokens_read = steps * WINDOWS_PER_STEP * BLOCK_SIZE
    rate = tokens_read / (time.perf_counter() - began)
    cpu_rate = tokens_read / (time.process_time() - cpu_began)
    more = private_mb() - before
    print(f"reader: {rate:,.0f} tokens/s, {cpu_rate:,.0f} per CPU second; {more:,.0f} MB of memory")
    began, windows = time.perf_counter(), (len(train) - 1) // BLOCK_SIZE - 1
    is_whole = all(_is_epoch_whole(train, epoch, windows) for epoch in range(2))
    batches.get(windows // WINDOWS_PER_STEP)  # the last windows of one epoch, the first of the next
    order_s = time.perf_counter() - began
    print(f"order: each of {windows:,} windows once per epoch: {is_whole} ({order_s:.1f} s)")
    return is_whole


def _make_sparse(file: Path, tokens: int) -> None:
    with open(file, "wb") as stream:
        stream.truncate(2 * tokens)


def _is_epoch_whole(train: TokenSplit, epoch: int, windows: int) -> bool:
    """Tell whether the windows of an epoch tile the tokens without a gap or an overlap."""
    samples = np.arange(epoch * windows, (epoch + 1) * windows)
    starts = np.sort(train.starts(samples, block_size=BLOCK_SIZE, seed=0, stream=0))
    tiles = bool((np.diff(starts) == BLOCK_SIZE).all())
    return tiles and starts[0] >= 0 and bool(starts[-1] + BLOCK_SIZE < len(train))


def private_mb() -> float:
    """Return this process's memory without files that are mapped, in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000
