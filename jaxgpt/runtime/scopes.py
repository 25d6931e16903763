"""Name the operations of a model by layer and part, as in blocks/3/attn/qkv, for profiles.

The names are metadata of the compiled program, and change none of its operations.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from flax import nnx


def name_scopes(model: nnx.Module) -> None:
    """Name each module of a model by its attribute: attn; in a list also by its number: blocks/3.

    The names are for `scoped`.
    """
    modules: Any = nnx.iter_modules(model)
    for path, module in modules:
        names = path[-2:] if path and isinstance(path[-1], int) else path[-1:]
        module.scope = "/".join(map(str, names))


def scoped(method: Callable) -> Callable:
    """Give the operations of a module's method the module's name, within that of its caller."""

    @wraps(method)
    def run(module: nnx.Module, *args: Any, **options: Any) -> Any:
        name = getattr(module, "scope", "")
        with jax.named_scope(name or type(module).__name__):
            return method(module, *args, **options)

    return run
