"""The mesh, and the one table that lays a parameter's axes over it.

XLA's partitioner does the rest: from these layouts it derives every collective.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config, UserError
from jaxgpt.kernels.accumulate import BATCH, max_sequences_per_device
from jaxgpt.kernels.platform import is_partitioned, target_platform

AXES = ("data", "fsdp", "tensor")

# A parameter's letters (see model.py) -> the mesh axis that splits them. Letters that are not
# here, and vectors of width D, are whole on every device.
RULES = {"V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}


def make_mesh(config: Config, devices: list | None = None) -> Mesh:
    """Return the mesh of `config.mesh`; by default every device is on `data`.

    Virtual CPU devices are only a way to use more cores, so by default as many are taken as the
    batch can be split over. Raises `UserError` with the sizes that do not divide.
    """
    devices = devices or jax.devices()
    sizes = parse_mesh(config.mesh)
    if not config.mesh:
        sizes["data"] = len(devices)
        while devices[0].platform == "cpu" and global_batch_size(config) % sizes["data"]:
            sizes["data"] -= 1
    count = math.prod(sizes.values())
    _check_count(config, sizes, devices)
    _check_divides(config, sizes)
    try:
        return jax.make_mesh(
            tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:count]
        )
    except NotImplementedError as error:  # the links of a TPU do not allow every shape
        raise UserError(f"mesh={config.mesh!r}: {str(error).splitlines()[0]}") from error


def parse_mesh(text: str) -> dict[str, int]:
    """Return the size of each axis for a text such as data:2,fsdp:4; axes not named have size 1."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    entries = [part.split(":") for part in text.split(",")] if text else []
    for axis, size in entries:
        if axis not in AXES:
            raise UserError(f"mesh={text!r}: {axis} must be one of {', '.join(AXES)}")
        if not int(size):
            raise UserError(f"mesh={text!r}: {axis} must be at least 1")
        sizes[axis] = int(size)
    if len(entries) > len(dict(entries)):
        raise UserError(f"mesh={text!r}: names an axis twice")
    return sizes


def _check_count(config: Config, sizes: dict[str, int], devices: list) -> None:
    count = math.prod(sizes.values())
    product = " x ".join(str(size) for size in sizes.values() if size > 1)
    product = f"{product} = {count}" if " x " in product else str(count)
    if count > len(devices):
        raise UserError(f"mesh={config.mesh!r}: {product} devices, but JAX finds {len(devices)}")
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"mesh={config.mesh!r}: {product} devices, but several processes must use all "
            f"{len(devices)} of theirs"
        )


def _check_divides(config: Config, sizes: dict[str, int]) -> None:
    requirements = [
        (
            sizes["data"] * sizes["fsdp"],
            "data x fsdp",
            global_batch_size(config),
            "sequences a step",
        ),
        (sizes["fsdp"], "fsdp", config.n_embd, "n_embd"),
        (sizes["tensor"], "tensor", config.kv_heads, "key-value heads"),
        (sizes["tensor"], "tensor", config.mlp_hidden_dim, "MLP width"),
        (sizes["tensor"], "tensor", config.padded_vocab_size, "rows of the embedding"),
    ]
    for size, axis, total, what in requirements:
        if total % size:
            raise UserError(f"mesh: {axis} = {size} does not divide {what} = {total}")


def local_mesh(count: int = 1) -> Mesh:
    """Return a mesh of this process's first devices, all of them on `data`."""
    devices = np.array(jax.local_devices()[:count]).reshape(count, 1, 1)
    return Mesh(devices, AXES, (AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Return how many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def global_batch_size(config: Config) -> int:
    """Return the sequences of a step, over all devices and micro-batches."""
    accumulation = config.batch_tokens // (config.batch_size * config.block_size)
    return config.batch_size * (accumulation or config.gradient_accumulation_steps)


def num_microbatches(config: Config, mesh: Mesh) -> int:
    """Return the micro-batches of a step: as few as keep a device's share within its bound.

    The bound is `batch_size`, or what the platform processes fast at a time. Every count gives the
    same step, up to rounding.
    """
    total, shards = global_batch_size(config), batch_shards(mesh)
    share = max_sequences_per_device(mesh, config.batch_size, config.block_size)
    counts = range(-(-total // (share * shards)), total + 1)
    return next(count for count in counts if total % (count * shards) == 0)


def eval_batches(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return the batches of an estimate, and the sequences of each.

    Together they have `eval_iters * batch_size` sequences on every mesh, rounded up to a multiple
    of its devices.
    """
    shards = batch_shards(mesh)
    total = -(-(config.eval_iters or 1) * config.batch_size // shards) * shards
    sizes = range(config.batch_size * shards, 0, -shards)
    size = next(size for size in sizes if total % size == 0)
    return total // size, size


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace for this mesh, and for the platform of its devices."""
    platform = target_platform(mesh.devices.flat[0].platform)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), platform:
        yield


def with_mesh(mesh: Mesh, function: Callable) -> Callable:
    """Return `function`, traced for this mesh."""

    def traced(*args):
        with use_mesh(mesh):
            return function(*args)

    return traced


def param_sharding(mesh: Mesh, axes: str) -> NamedSharding:
    """Return where a parameter with these letters lives: `VD` is P('tensor', 'fsdp')."""
    letters = axes if axes.strip("L") != "D" else ""
    return NamedSharding(mesh, PartitionSpec(*(RULES.get(letter) for letter in letters)))


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Split an array over these mesh axes, where a function is traced for several devices."""
    if not is_partitioned():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_batch(x_BTD: jax.Array) -> jax.Array:
    """Split the residual stream over the batch alone.

    Left to itself, XLA may split it over D, as weights are under `fsdp`. Then every device would
    compute the whole batch, and sum it with the others.
    """
    return constrain(x_BTD, BATCH)
