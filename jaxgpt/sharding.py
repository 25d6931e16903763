"""Split parameters over the mesh by one table, and activations over the batch.

From these shardings XLA derives the collectives, except those in kernels/accumulate.py. The axes of
the mesh are `data` (sequences), `fsdp` (sequences, and parameters over D) and `tensor` (heads, MLP
width and vocabulary).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.kernels.platform import BATCH, is_partitioned, platform_of, target_platform

# A parameter's axis letter (see model.py) -> the mesh axis that splits this axis. Other axes, and
# vectors of width D, are replicated on every device.
RULES = {"V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace for this mesh, and for the platform of its devices; also a decorator."""
    platform = target_platform(platform_of(mesh.devices.flat[0]))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), platform:
        yield


def param_sharding(mesh: Mesh, axes: str) -> NamedSharding:
    """Return the sharding of a parameter with these axis letters: VD is P("tensor", "fsdp").

    If RULES gives two axes of a parameter to one mesh axis, as in DD, only the first is split.
    """
    letters = "" if axes.strip("L") == "D" else axes  # every device holds a vector of width D
    spec: list[str | None] = []
    for letter in letters:
        mesh_axis = RULES.get(letter)
        spec.append(None if mesh_axis in spec else mesh_axis)
    return NamedSharding(mesh, PartitionSpec(*spec))


def update_sharding(mesh: Mesh, axes: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a parameter's moments and update under `shard_optimizer`.

    `data` splits the first axis that is not L (layers) and whose length on one device is a multiple
    of the size of `data`. A part of a first axis is contiguous in memory, so it is sent without a
    copy. If there is no such axis, the sharding is that of the parameter.
    """
    sharding = param_sharding(mesh, axes)
    local = sharding.shard_shape(shape)
    for i, letter in enumerate(axes):
        if letter != "L" and local[i] % mesh.shape["data"] == 0:
            spec = [*sharding.spec, *[None] * len(axes)][: len(axes)]
            spec[i] = ("data",) if spec[i] is None else (spec[i], "data")
            return NamedSharding(mesh, PartitionSpec(*spec))
    return sharding


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


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
