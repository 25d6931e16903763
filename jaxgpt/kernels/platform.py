"""The platform that a function is traced for, and whether its mesh splits arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.sharding import AxisType

_TARGET: ContextVar[str] = ContextVar("target_platform", default="")


@contextmanager
def target_platform(name: str) -> Iterator[None]:
    """Trace functions for a platform ("cpu", "gpu" or "tpu"), which may be absent."""
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)


def current_platform() -> str:
    """Return the innermost `target_platform`, or else JAX's default back end."""
    return _TARGET.get() or jax.default_backend()


def is_partitioned() -> bool:
    """Return whether XLA splits arrays over the current mesh; inside shard_map it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types)
