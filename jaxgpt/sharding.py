"""The mesh, and the one table that lays a parameter's axes over it.

XLA's partitioner does the rest: from these layouts it derives every collective.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config, UserError

AXES = ("data", "fsdp", "tensor")

# A parameter's letters (see model.py) -> the mesh axis that splits them. Letters that are not
# here, and vectors of width D, are whole on every device.
RULES = {"V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}
BATCH = ("data", "fsdp")
CPU_TOKENS = 2048  # in a core's share of a micro-batch


def make_mesh(config: Config, devices: list | None = None) -> Mesh:
    """The mesh of `config.mesh`; by default every device is on `data`.

    Virtual CPU devices are only a way to use more cores, so by default as many are taken as the
    batch can be split over. Raises `UserError` with the sizes that do not divide.
    """
    devices = devices or jax.devices()
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    if config.mesh:
        given = [part.split(":") for part in config.mesh.split(",")]
        for axis, size in given:
            if axis not in AXES:
                raise UserError(f"mesh={config.mesh!r}: {axis} must be one of {', '.join(AXES)}")
            if not int(size):
                raise UserError(f"mesh={config.mesh!r}: {axis} must be at least 1")
            sizes[axis] = int(size)
        if len(given) > len(dict(given)):
            raise UserError(f"mesh={config.mesh!r}: names an axis twice")
    else:
        sizes["data"] = len(devices)
        while devices[0].platform == "cpu" and global_batch_size(config) % sizes["data"]:
            sizes["data"] -= 1
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
    _check_divides(config, sizes)
    try:
        return _mesh(tuple(sizes.values()), devices[:count])
    except NotImplementedError as error:  # the links of a TPU do not allow every shape
        raise UserError(f"mesh={config.mesh!r}: {str(error).splitlines()[0]}") from error


def local_mesh(count: int = 1) -> Mesh:
    """The mesh of this process's first devices, all of them on `data`."""
    devices = np.array(jax.local_devices()[:count]).reshape(count, 1, 1)
    return Mesh(devices, AXES, (AxisType.Auto,) * len(AXES))


def _mesh(shape: tuple[int, ...], devices: list) -> Mesh:
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def global_batch_size(config: Config) -> int:
    """Sequences in a step, over all devices and micro-batches."""
    accumulation = config.batch_tokens // (config.batch_size * config.block_size)
    return config.batch_size * (accumulation or config.gradient_accumulation_steps)


def num_microbatches(config: Config, mesh: Mesh) -> int:
    """Micro-batches a step: as few as keep a device's share of one within `batch_size`.

    On the cores of a CPU also within `CPU_TOKENS`: what they work on is given back to the system
    after a dispatch, and gigabytes of it take longer to get again than to compute.
    Every count gives the same step, up to rounding.
    """
    total, devices = global_batch_size(config), mesh.shape["data"] * mesh.shape["fsdp"]
    most = config.batch_size * devices
    if is_virtual_cpu_mesh(mesh):
        most = min(most, max(1, CPU_TOKENS // config.block_size) * devices)
    return next(n for n in range(-(-total // most), total + 1) if total % (n * devices) == 0)


def eval_batches(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Batches an estimate takes, and sequences in each.

    Together `eval_iters * batch_size` sequences on every mesh, but for a last few that make them
    a multiple of its devices.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    total = -(-(config.eval_iters or 1) * config.batch_size // devices) * devices
    most = config.batch_size * devices
    size = next(n for n in range(most, 0, -devices) if total % n == 0)
    return total // size, size


def _check_divides(config: Config, sizes: dict[str, int]) -> None:
    over_batch = sizes["data"] * sizes["fsdp"]
    wanted = [
        (over_batch, "data x fsdp", global_batch_size(config), "sequences a step"),
        (sizes["fsdp"], "fsdp", config.n_embd, "n_embd"),
        (sizes["tensor"], "tensor", config.kv_heads, "key-value heads"),
        (sizes["tensor"], "tensor", config.mlp_hidden_dim, "MLP width"),
        (sizes["tensor"], "tensor", config.padded_vocab_size, "rows of the embedding"),
    ]
    for size, axis, total, what in wanted:
        if total % size:
            raise UserError(f"mesh: {axis} = {size} does not divide {what} = {total}")


def is_virtual_cpu_mesh(mesh: Mesh) -> bool:
    """Whether these are a CPU's virtual devices, with all of the parameters on each."""
    over_data = 1 < mesh.size == mesh.shape["data"]
    return over_data and all(device.platform == "cpu" for device in mesh.devices.flat)


def with_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced where kernels that must be told of the mesh can ask JAX for it."""

    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def param_sharding(mesh: Mesh, axes: str) -> NamedSharding:
    """Where a parameter with these letters lives: `VD` is P('tensor', 'fsdp')."""
    letters = axes if axes.strip("L") != "D" else ""
    return NamedSharding(mesh, PartitionSpec(*(RULES.get(letter) for letter in letters)))
