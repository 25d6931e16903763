"""The one table that splits parameters over the mesh, and how a batch is split.

From these shardings XLA derives every collective. The axes of the mesh are `data` (sequences),
`fsdp` (sequences, and parameters over D) and `tensor` (heads, MLP width and vocabulary).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config
from jaxgpt.kernels.accumulate import BATCH, max_sequences_per_device
from jaxgpt.kernels.platform import is_partitioned, target_platform

# A parameter's axis letter (see model.py) -> the mesh axis that splits this axis. Other axes, and
# vectors of width D, are replicated on every device.
RULES = {"V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}


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
    share = max_sequences_per_device(mesh, config.batch_size, config.block_size)
    counts = range(-(-total // (share * shards)), total + 1)
    return next(count for count in counts if total % (count * shards) == 0)


def eval_batches(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return the batches per evaluation of a split, and the sequences per batch.

    On every mesh their product is `eval_iters * batch_size`, rounded up to a multiple of the
    parts of a batch.
    """
    shards = batch_shards(mesh)
    total = -(-(config.eval_iters or 1) * config.batch_size // shards) * shards
    sizes = range(config.batch_size * shards, 0, -shards)
    size = next(size for size in sizes if total % size == 0)
    return total // size, size


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace for this mesh, and for the platform of its devices; also a decorator."""
    platform = target_platform(mesh.devices.flat[0].platform)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), platform:
        yield


def param_sharding(mesh: Mesh, axes: str) -> NamedSharding:
    """Return the sharding of a parameter with these axis letters: VD is P("tensor", "fsdp")."""
    letters = axes if axes.strip("L") != "D" else ""
    return NamedSharding(mesh, PartitionSpec(*(RULES.get(letter) for letter in letters)))


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Split an array over these mesh axes if the function is traced for several devices."""
    if not is_partitioned():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_batch(x_BTD: jax.Array) -> jax.Array:
    """Split the residual stream over the batch only.

    Otherwise XLA may split it over D, as it splits weights under `fsdp`. Then every device would
    compute the whole batch, and the devices would sum their parts.
    """
    return constrain(x_BTD, BATCH)
