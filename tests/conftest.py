"""Run the tests on eight virtual CPU devices, with a compilation cache for the next run.

LLVM optimisations are off: they take longer than these small programs run. All XLA passes run.
`pytest -m gpu` computes on a GPU, with a CPU beside it to compare with.
"""

import os
import re
from pathlib import Path

import pytest
from hypothesis import settings

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
ON_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # other processes of the tests need memory too
ALWAYS = {
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before a test file imports JAX."""
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")) is not None
    for name, value in (ALWAYS | (ON_GPU if on_gpu else ON_CPU)).items():
        os.environ.setdefault(name, value)
    if on_gpu and "cpu" not in os.environ.get("JAX_PLATFORMS", "cpu"):
        os.environ["JAX_PLATFORMS"] += ",cpu"


settings.register_profile("tests", deadline=None)  # a first call may have to compile
settings.load_profile("tests")
