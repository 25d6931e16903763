"""What an operation asks while it is traced: its platform, split arrays, the dtype of sums."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

BATCH = ("data", "fsdp")  # the mesh axes that split the sequences
_TARGET: ContextVar[str] = ContextVar("target_platform", default="")


@contextmanager
def target_platform(name: str) -> Iterator[None]:
    """Trace functions for a platform ("cpu", "gpu" or "tpu"), which may be absent."""
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform_of(device: Any) -> str:
    """Return the platform whose variants a device can run.

    Kernels in Triton need a GPU of the Ampere generation or a later one, with compute capability 8,
    and a JAX that still has Pallas' back end for Triton. Other GPUs get the operations for any
    platform.
    """
    if device.platform != "gpu":
        return device.platform
    is_old = re.fullmatch(r"[1-7]\.\d", getattr(device, "compute_capability", ""))
    return "gpu" if has_triton() and not is_old else "gpu without triton"


@cache
def has_triton() -> bool:
    """Tell whether this JAX has Pallas' back end for Triton, which JAX 0.11 has deprecated."""
    try:
        return importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    except ModuleNotFoundError:
        return False


def current_platform() -> str:
    """Return the innermost `target_platform`, or else the platform of JAX's default device."""
    return _TARGET.get() or platform_of(jax.devices()[0])


def accum_dtype(x: Any) -> jax.typing.DTypeLike:
    """Return the dtype of sums over x: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def is_partitioned() -> bool:
    """Return whether XLA splits arrays over the current mesh; inside shard_map it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types)


def is_split(axis: str) -> bool:
    """Return whether XLA splits arrays over this axis of the current mesh."""
    return is_partitioned() and jax.sharding.get_abstract_mesh().shape[axis] > 1


def over_batch(function: Callable, last_axis: str | None = None) -> Callable:
    """Return `function` as each device applies it to its own sequences, [B, T, ...].

    XLA cannot split a Pallas kernel over devices. The mesh axis `last_axis` splits the last axis of
    arrays [B, T, D].
    """
    if not is_partitioned():
        return function
    spec = PartitionSpec(BATCH, None, last_axis) if last_axis else PartitionSpec(BATCH)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
