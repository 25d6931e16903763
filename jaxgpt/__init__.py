"""nanoGPT rebuilt in JAX and Flax for accelerator throughput.

`import jaxgpt` is quick: JAX is imported when `train`, `load` or `Run` is first used.
"""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than this file's
if TYPE_CHECKING:
    from typing import Any

    from jaxgpt.api import Run, load, train
    from jaxgpt.config import Config, UserError

__version__ = "0.1.0"
__all__ = ["Config", "Run", "UserError", "load", "train"]


def __getattr__(name: str) -> "Any":
    """Import a name of `__all__` when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "jaxgpt.config" if name in ("Config", "UserError") else "jaxgpt.api"
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which `train` is the function, although a module has the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__:  # the import of `jaxgpt.train` would set it to the module
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
