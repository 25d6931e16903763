"""Name the platform that a function is traced for, and ask how its mesh splits arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.sharding import AxisType

_TARGET: ContextVar[str] = ContextVar("target_platform", default="")


@contextmanager
def target_platform(name: str) -> Iterator[None]:
    """Trace for this platform ("cpu", "gpu" or "tpu"), which need not be attached."""
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)


def current_platform() -> str:
    """Return the platform that is traced for: the one named last, else JAX's default."""
    return _TARGET.get() or jax.default_backend()


def is_partitioned() -> bool:
    """Whether XLA splits arrays over the mesh that is traced for; inside shard_map it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types)
