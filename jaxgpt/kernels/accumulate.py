"""Gradient accumulation over the micro-batches of a step.

M micro-batches, B sequences of a micro-batch, T length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

BATCH = ("data", "fsdp")
MAX_CPU_TOKENS = 2048  # per core and micro-batch (performance.md, "No more than 2,048 tokens")


def accumulation_reference(mesh: Mesh) -> Callable:
    """Return the function that accumulates on this mesh."""
    return accumulate


def accumulate(grad_fn: Callable, params: Any, windows_MBT, keys_MB) -> tuple:
    """Sum loss, targets and gradients of the micro-batches, in float32 at least.

    `grad_fn(params, windows_BT, keys_B)` returns ((loss, targets), gradients).
    """
    if len(windows_MBT) == 1:
        return to_float32(grad_fn(params, windows_MBT[0], keys_MB[0]))

    def add(sums: tuple, micro: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, to_float32(grad_fn(params, *micro))), None

    shapes = jax.eval_shape(grad_fn, params, windows_MBT[0], keys_MB[0])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(to_float32, shapes))
    return jax.lax.scan(add, zeros, (windows_MBT, keys_MB))[0]


def to_float32(tree: Any) -> Any:
    """Widen floating-point arrays to float32 at least; leave integers as they are."""

    def widen(x: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float else x

    return jax.tree.map(widen, tree)


def accumulation_cpu(mesh: Mesh) -> Callable:
    """Accumulate on each virtual device, and then sum over the devices once, as one array.

    XLA:CPU's all-reduce lets the devices meet once for every array that it is given
    (performance.md, "One all-reduce").
    """
    if not is_virtual_cpu_mesh(mesh):
        return accumulate

    def accumulate_apart(grad_fn: Callable, params: Any, windows_MBT, keys_MB) -> tuple:
        def local(params: Any, windows_MBT: jax.Array, keys_MB: jax.Array) -> tuple:
            flat, unravel = ravel_pytree(accumulate(grad_fn, params, windows_MBT, keys_MB))
            return unravel(jax.lax.psum(flat, BATCH))

        split, whole = PartitionSpec(None, BATCH), PartitionSpec()
        specs: dict[str, Any] = {"in_specs": (whole, split, split), "out_specs": whole}
        mapped = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
        return mapped(params, windows_MBT, keys_MB)

    return accumulate_apart


def is_virtual_cpu_mesh(mesh: Mesh) -> bool:
    """Whether these are a CPU's virtual devices, with all of the parameters on each."""
    over_data = 1 < mesh.size == mesh.shape["data"]
    return over_data and all(device.platform == "cpu" for device in mesh.devices.flat)


def max_sequences_per_device(mesh: Mesh, batch_size: int, block_size: int) -> int:
    """Return how many sequences a device should process at a time; at most `batch_size`.

    XLA:CPU frees its buffers after each call, and allocating gigabytes again is slower than
    computing on them.
    """
    if not is_virtual_cpu_mesh(mesh):
        return batch_size
    return min(batch_size, max(1, MAX_CPU_TOKENS // block_size))
