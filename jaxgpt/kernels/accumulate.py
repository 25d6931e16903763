"""Gradient accumulation over the micro-batches of a step.

M micro-batches, B sequences per micro-batch, T length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from jaxgpt.kernels.platform import BATCH, accum_dtype

MAX_CPU_TOKENS = 2048  # per core (docs/performance.md, "At most 2,048 tokens per core")


def accumulate(grad_fn: Callable, params: Any, windows_MBT, keys_MB) -> tuple:
    """Sum the loss, the number of targets and the gradients over micro-batches.

    `windows_MBT` are int32 tokens and `keys_MB` dropout keys. `grad_fn(params, windows_BT, keys_B)`
    returns ((loss, targets), gradients). Sums are float32 at least.
    """

    def compute(windows_BT: jax.Array, keys_B: jax.Array) -> tuple:
        return to_float32(grad_fn(params, windows_BT, keys_B))

    def add(sums: tuple, micro_batch: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, compute(*micro_batch)), None

    if len(windows_MBT) == 1:
        return compute(windows_MBT[0], keys_MB[0])
    shapes = jax.eval_shape(compute, windows_MBT[0], keys_MB[0])
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, (windows_MBT, keys_MB))[0]


def to_float32(tree: Any) -> Any:
    """Convert floating-point arrays to float32 at least; do not change integers."""

    def widen(x: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(accum_dtype(x)) if is_float else x

    return jax.tree.map(widen, tree)


def sum_over_devices_reference(mesh: Mesh, grad_specs: Any) -> Callable:
    """Return a decorator of functions `(params, windows_MBT, keys_MB) -> (totals, gradients)`.

    `grad_specs` are the `PartitionSpec` of the gradients under `shard_optimizer`, else None.
    Without them the decorator changes nothing, because XLA sums over the devices. With them, on a
    mesh of `data` alone, each device calls the function on its own sequences, and then the
    gradients are reduce-scattered once. If XLA split them, it would reduce-scatter them in every
    micro-batch.
    """
    if grad_specs is None or not is_data_mesh(mesh):
        return lambda function: function

    def add(sums: tuple) -> tuple:
        totals, grads = sums
        return jax.lax.psum(totals, BATCH), jax.tree.map(add_and_split, grads, grad_specs)

    return partial(on_each_device, mesh, add, (PartitionSpec(), grad_specs))


def sum_over_devices_cpu(mesh: Mesh, grad_specs: Any) -> Callable:
    """Return a decorator that calls a function on each virtual device, then sums over devices once.

    All sums are one array, because XLA:CPU synchronises the devices once per array
    (docs/performance.md, "One all-reduce per step").
    """
    if grad_specs is not None or not is_virtual_cpu_mesh(mesh):
        return sum_over_devices_reference(mesh, grad_specs)

    def add(sums: tuple) -> tuple:
        flat, unravel = ravel_pytree(sums)
        return unravel(jax.lax.psum(flat, BATCH))

    return partial(on_each_device, mesh, add, PartitionSpec())


def on_each_device(mesh: Mesh, add: Callable, out_specs: Any, function: Callable) -> Callable:
    """Return `function` as each device calls it on its own sequences, followed by `add`."""
    split, whole = PartitionSpec(None, BATCH), PartitionSpec()
    in_specs = whole, split, split
    local = lambda *arguments: add(function(*arguments))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def add_and_split(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Sum the arrays of all devices; return the part of the sum that `spec` gives this device."""
    axis = next((i for i, names in enumerate(spec) if names and "data" in names), None)
    if axis is None:
        return jax.lax.psum(x, BATCH)
    return jax.lax.psum_scatter(x, "data", scatter_dimension=axis, tiled=True)


def is_data_mesh(mesh: Mesh) -> bool:
    """Return whether the mesh has several devices that each hold all parameters."""
    return 1 < mesh.size == mesh.shape["data"]


def is_virtual_cpu_mesh(mesh: Mesh) -> bool:
    """Return whether the mesh has several CPU devices that each hold all parameters."""
    return is_data_mesh(mesh) and all(device.platform == "cpu" for device in mesh.devices.flat)


def max_sequences_per_device(mesh: Mesh, batch_size: int, block_size: int) -> int:
    """Return how many sequences a device processes at a time, at most `batch_size`.

    On the virtual devices of a CPU these sequences have at most MAX_CPU_TOKENS tokens, or there is
    one sequence: larger buffers take longer to allocate than to compute.
    """
    if not is_virtual_cpu_mesh(mesh):
        return batch_size
    return min(batch_size, max(1, MAX_CPU_TOKENS // block_size))
