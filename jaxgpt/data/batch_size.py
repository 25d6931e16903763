"""How many sequences a step has, and into which micro-batches a mesh splits them."""

import math

from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.kernels.accumulate import max_sequences_per_device


def batch_shards(mesh: Mesh) -> int:
    """Return the number of parts into which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def global_batch_size(config: Config) -> int:
    """Return the sequences per step, over all devices and micro-batches."""
    accumulation = config.batch_tokens // (config.batch_size * config.block_size)
    return config.batch_size * (accumulation or config.gradient_accumulation_steps)


def num_microbatches(config: Config, mesh: Mesh) -> int:
    """Return the micro-batches per step: as few as keep a device's share within its limit.

    The limit is `batch_size`, or fewer sequences where the platform computes those faster. The
    result of a step does not depend on the number of micro-batches, up to rounding.
    """
    total, shards = global_batch_size(config), batch_shards(mesh)
    limit = max_sequences_per_device(mesh, config.batch_size, config.block_size)
    counts = range(math.ceil(total / (limit * shards)), total + 1)
    return next(count for count in counts if total % (count * shards) == 0)


def eval_batches_and_size(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return the batches per evaluation of a split, and the sequences per batch.

    On every mesh their product is `eval_iters * batch_size`, rounded up to a multiple of the
    parts of a batch.
    """
    shards = batch_shards(mesh)
    wanted = (config.eval_iters or 1) * config.batch_size
    total = math.ceil(wanted / shards) * shards
    sizes = range(config.batch_size * shards, 0, -shards)
    size = next(size for size in sizes if total % size == 0)
    return total // size, size
