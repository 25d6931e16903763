"""Start JAX on the hardware, and replace each `auto` of a config by what suits the hardware."""

import ctypes
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxgpt.config import Config, DataConfig, ParallelConfig, UserError
from jaxgpt.data.tokens import Dataset
from jaxgpt.kernels import dot_product_attention
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.kernels.platform import platform_of
from jaxgpt.runtime.files import cores

MAX_RESIDENT = 2**31  # tokens: their positions on the device are int32
UNKNOWN_MEMORY = 2 << 30  # bytes, for a device that does not report its memory
CACHE = Path.home() / ".cache" / "jaxgpt" / "compiled"

# Dense bfloat16 FLOP/s of one device from the makers' data sheets, without sparsity, by the longest
# prefix of JAX's name for the device.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12, "NVIDIA A10": 125e12, "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12, "NVIDIA L40": 181e12, "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12, "NVIDIA H200 NVL": 835e12, "NVIDIA GH200": 989.4e12,
    "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12,
    "NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 3090 Ti": 80e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "TPU v2": 22.5e12, "TPU v3": 61.5e12,  # of a core, half a chip
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # of half a chip
}  # fmt: skip

# Variables that set the fraction of a GPU's memory that JAX reserves, and our default.
MEMORY_VARIABLES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
MEMORY_FRACTION = "0.9"


KEEP_FREED = {  # options of glibc's mallopt by their numbers in malloc.h
    -8: 1,  # M_ARENA_MAX: heaps
    -4: 0,  # M_MMAP_MAX: buffers in mappings of their own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: free bytes at the end of the heap that glibc keeps
}
RETURN_LARGE = {
    -4: 65_536,  # M_MMAP_MAX: glibc's default
    -3: 32 << 20,  # M_MMAP_THRESHOLD: bytes of the smallest buffer in a mapping of its own
}
LARGE_MODEL = 32_000_000  # parameters, from which on freed memory is not kept


@dataclass(frozen=True)
class XlaOption:
    """An option of XLA's compiler for the training step, why it has this value, and who says so."""

    name: str
    value: str | bool
    reason: str
    source: str


NO_TRITON = XlaOption(
    "xla_gpu_enable_triton_gemm", False,
    "cuBLASLt multiplies large matrices as fast, and takes GELU into the product",
    "measured: docs/performance.md, \"Products by cuBLASLt\"",
)  # fmt: skip
NO_MERGER = XlaOption(
    "xla_gpu_dot_merger_threshold_mb", "0",
    "XLA merges products that linear_parts_gpu keeps apart, and pays slices and concatenations",
    "measured: docs/performance.md, \"No merged products\"",
)  # fmt: skip
# XLA otherwise gathers and scatters most layers in one call, which then waits for all of them.
COMBINED_BYTES = 16 << 20
SMALL_GATHERS, SMALL_SCATTERS = (
    XlaOption(
        f"xla_gpu_{kind}_combine_threshold_bytes", str(COMBINED_BYTES),
        "under fsdp, more of the communication runs while the device computes",
        "compiled: docs/performance.md, \"Small collectives under fsdp\"",
    )
    for kind in ("all_gather", "reduce_scatter")
)  # fmt: skip
DETERMINISTIC = XlaOption(
    "xla_gpu_exclude_nondeterministic_ops", True,
    "scatters and attention's gradient otherwise add in an order that varies",
    "XLA: Determinism (GPU)",
)  # fmt: skip
XLA_OPTIONS = {
    "one GPU": (NO_TRITON, NO_MERGER),
    "several GPUs": (NO_TRITON, NO_MERGER, SMALL_GATHERS, SMALL_SCATTERS),
    "TPU": (),
    "CPU": (),
}


# The attention back ends of each platform, the fastest first.
FASTEST_ATTENTION = {"cpu": ["cpu"], "gpu": ["cudnn", "flash"], "tpu": ["splash"]}


def start(device: str = "auto", *, float64: bool = False) -> None:
    """Configure JAX for the `device` of a config; call this before JAX computes anything.

    A CPU becomes one virtual device per core, because XLA:CPU runs most elementwise work on one
    thread per device. JAX reserves nine tenths of a GPU's memory. The user's own JAX_* and XLA_*
    settings are kept. In a process that has started JAX already, its devices stay as they are.
    Raises `UserError`.
    """
    platforms = jax.config.values["jax_platforms"]
    if device != "auto":
        jax.config.update("jax_platforms", device)
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in flags:
        with suppress(RuntimeError):  # JAX has started already
            jax.config.update("jax_num_cpu_devices", cores())
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if device == "cpu" or not has_accelerator_plugin():
        set_malloc(KEEP_FREED)
    if memory_fraction() is None:
        os.environ[MEMORY_VARIABLES[-1]] = MEMORY_FRACTION
    jax.config.update("jax_enable_x64", float64)
    try:
        _start_jax(device, platforms)
    except UserError:
        jax.config.update("jax_platforms", platforms)
        raise


def enable_float64(config: Config) -> None:
    """Let JAX compute in float64 if a config does, which the config file chose after `start`."""
    jax.config.update("jax_enable_x64", config.dtype == "float64")


def has_accelerator_plugin() -> bool:
    """Tell whether JAX is installed with support for a GPU or a TPU."""
    return bool(entry_points(group="jax_plugins")) or find_spec("libtpu") is not None


def set_malloc(options: dict[int, int]) -> None:
    """Set options of glibc's malloc, unless the user has; other C libraries are left alone.

    XLA:CPU frees its buffers after each call. glibc returns large ones to the system, which then
    has to clear every page again in the next call. With KEEP_FREED all threads share one heap that
    keeps them, because the heap of a thread has no room for large buffers. This has no effect on
    threads that have started. The heap has gaps, so a large model would need much more memory and
    gain nothing. `save_memory` therefore undoes the effect for large models
    (docs/performance.md, "Freed memory is kept").
    """
    has_own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not has_own:
        for option, value in options.items():
            mallopt(option, value)


def save_memory(num_params: int) -> None:
    """Return large freed buffers to the system from now on, if a model on a CPU is large."""
    if is_cpu() and num_params >= LARGE_MODEL:
        set_malloc(RETURN_LARGE)


def _start_jax(device: str, platforms: str | None) -> None:
    """Start JAX unless it has started. Raises `UserError` if it does not run on `device`."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform is left
        reason = next(iter(str(error).splitlines()), "there is no such device")
        advice = f"another JAX_PLATFORMS than {platforms}" if device == "auto" else "--device=auto"
        problem = f"JAX cannot use it ({reason}); try {advice}"
        raise UserError(f"device={device!r}: {problem}") from error
    started = jax.default_backend()
    if {"auto": started, "cuda": "gpu"}.get(device, device) != started:
        problem = f"JAX has started on a {started} in this process"
        raise UserError(f"device={device!r}: {problem}; expected {started}, or a new process")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error of JAX says that a device has too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


@contextmanager
def explain_out_of_memory(subject: str, work: str, advice: str) -> Iterator[None]:
    """Raise `UserError` about `subject` where JAX finds too little memory for this work."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # a TPU has "Ran out of memory"
        reason = re.search(r"Out of memory.*?(?=\.?$)", str(error), re.MULTILINE | re.IGNORECASE)
        if reason is None:
            raise
        problem = f"{work} does not fit into the device's memory ({reason[0]})"
        raise UserError(f"{subject}: {problem}; {advice}") from error


def memory_fraction() -> str | None:
    """Return the fraction of a GPU's memory that the user lets JAX reserve, or None if unset."""
    return next((os.environ[name] for name in MEMORY_VARIABLES if os.environ.get(name)), None)


def compiler_options(config: ParallelConfig, mesh: Mesh) -> dict[str, str | bool]:
    """Return the XLA options of the training step on a mesh, whose devices may be absent.

    They are those of `XLA_OPTIONS` for its kind of program, and `DETERMINISTIC` for that key. Left
    out are options that the installed XLA does not know, and those that the user has set in
    XLA_FLAGS or LIBTPU_INIT_ARGS.
    """
    platform = mesh.devices.flat[0].platform
    gpus = "one GPU" if mesh.size == 1 else "several GPUs"
    kind = {"gpu": gpus, "tpu": "TPU"}.get(platform, "CPU")
    chosen = XLA_OPTIONS[kind] if config.xla == "tuned" else ()
    if config.deterministic and platform == "gpu":
        chosen = (*chosen, DETERMINISTIC)
    users = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    wanted = {o.name: o.value for o in chosen if not re.search(rf"--{o.name}(?![\w])", users)}
    # JAX compiles only for devices of this process, or for absent ones.
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    device = (local or mesh.devices.flat)[0]
    return known_options(device, tuple(wanted.items())) if wanted else {}


@cache
def known_options(
    device: Any, options: tuple[tuple[str, str | bool], ...]
) -> dict[str, str | bool]:
    """Return the options that the installed XLA knows: it rejects others when it compiles."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    lowered = jax.jit(lambda x: x).lower(number)

    def is_known(*some: tuple[str, str | bool]) -> bool:
        try:
            lowered.compile(dict(some))
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    with no_compilation_cache():
        if is_known(*options):  # usually one compilation suffices
            return dict(options)
        return dict(option for option in options if is_known(option))


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Write no compiled program to the cache, because JAX cannot load one for an absent device."""
    option = "jax_persistent_cache_min_compile_time_secs"
    seconds = jax.config.values[option]
    jax.config.update(option, math.inf)
    try:
        yield
    finally:
        jax.config.update(option, seconds)


def is_cpu() -> bool:
    """Tell whether JAX computes on a CPU."""
    return jax.default_backend() == "cpu"


def peak_flops() -> float | None:
    """Return the dense bfloat16 FLOP/s of one device, or None if they are unknown."""
    kind = jax.devices()[0].device_kind
    if "Laptop" in kind:  # slower than the card of the same name
        return None
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def is_hopper_or_later(capability: str = "") -> bool:
    """Tell whether NVIDIA GPUs are of the Hopper generation or a later one.

    `capability` is their compute capability, by default that of the attached devices.
    """
    capability = capability or getattr(jax.devices()[0], "compute_capability", "")
    return re.fullmatch(r"(9|1\d)\.\d", capability) is not None


def memory_bytes() -> int | None:
    """Return the memory of one device that JAX may use, or None if it is unknown."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def fits_on_device(config: DataConfig, dataset: Dataset) -> bool:
    """Tell whether to keep both splits in device memory: `auto` allows an eighth of the memory.

    Raises `UserError` for `always` if int32 cannot count the tokens.
    """
    tokens = len(dataset.train) + len(dataset.val)
    num_bytes = tokens * dataset.train.dtype.itemsize
    if config.data_on_device == "always" and tokens >= MAX_RESIDENT:
        problem = f"the dataset has {tokens:,} tokens"
        advice = f"expected fewer than {MAX_RESIDENT:,}; try --data_on_device=auto"
        raise UserError(f"data_on_device='always': {problem}; {advice}")
    fits = tokens < MAX_RESIDENT and num_bytes <= (memory_bytes() or UNKNOWN_MEMORY) // 8
    return {"always": True, "never": False, "auto": fits}[config.data_on_device]


def resolve_auto(
    config: Config, target_platform: str = "", capability: str = ""
) -> tuple[Config, list[str]]:
    """Replace every `auto` of a config for this hardware; return the config, and notes for the log.

    A `target_platform` ("gpu" or "tpu") need not be attached, so no kernel is tried on it.
    `capability` is its compute capability if it is an NVIDIA GPU.
    """
    platform = target_platform or jax.default_backend()
    if config.dtype == "auto":
        config = config.replace(dtype="float32" if platform == "cpu" else "bfloat16")
    attention, notes = choose_attention(config, target_platform, capability)
    return config.replace(attention=attention), notes


def inference_config(config: Config, dtype: str = "auto", **keys: Any) -> Config:
    """Return a trained model's config for this hardware: no dropout, the fastest attention.

    A `dtype` of auto is the hardware's, or float64 if the model was trained in it.
    """
    if dtype == "auto" and config.dtype == "float64":
        dtype = "float64"
    keys = {"attention": "auto", "dropout": 0.0, "dtype": dtype} | keys
    return resolve_auto(config.replace(**keys))[0]


def choose_attention(
    config: Config, target_platform: str = "", capability: str = ""
) -> tuple[str, list[str]]:
    """Choose the back end for `attention=auto`; return it, and notes if no fast one can be used.

    Without a target platform the back end is also tried. Raises `UserError` if a back end that the
    user chose cannot do what the model needs.
    """
    c, platform = config, target_platform or jax.default_backend()
    if c.attention != "auto":
        if reason := _unsupported_reason(c, c.attention, platform, capability):
            also = " or" if "; try " in reason else "; try"
            raise UserError(f"attention={c.attention!r}: {reason}{also} --attention=auto")
        return c.attention, []
    failed, unsupported = [], []
    for backend in FASTEST_ATTENTION.get(platform, []):
        if reason := _unsupported_reason(c, backend, platform, capability):
            unsupported = [f"{backend} {reason}"]
        elif not target_platform and platform != "cpu" and (failure := self_test(c, backend)):
            failed = [f"{backend} failed its test: {failure}"]
        else:
            return backend, [f"attention='auto': uses {backend}, because {why}" for why in failed]
    fallback = "reference" if c.attention_dropout_rate else "xla"
    reasons = failed or unsupported
    return fallback, [f"attention='auto': uses {fallback}, because {why}" for why in reasons]


def _unsupported_reason(c: Config, backend: str, platform: str, capability: str) -> str:
    """Return what the model needs and this back end cannot do, or ""."""
    no_dropout = f"has no dropout of attention weights, but dropout={c.dropout}; "
    no_dropout += "try --attention_dropout=False"
    widest = 256 if platform == "gpu" and is_hopper_or_later(capability) else 128
    widths = f"needs a head dim that is a multiple of 8 up to {widest}, not {c.head_dim}"
    lengths = f"needs a block_size that is a multiple of 128, not {c.block_size}"
    limits = {
        "cpu": [(platform != "cpu", "runs only on CPUs")],
        "cudnn": [
            (platform != "gpu", "needs an NVIDIA GPU"),
            (c.dtype != "bfloat16", f"needs dtype=bfloat16, not {c.dtype}"),
            (c.attention_dropout_rate, no_dropout),
            (c.document_mask, "cannot keep documents apart, but document_mask=True"),
            (c.head_dim % 8 or c.head_dim > widest, widths),
        ],
        "flash": [
            (platform != "gpu", "needs an NVIDIA GPU"),
            (
                platform_of(jax.devices()[0]) == "gpu without triton",
                "needs a GPU from Ampere on, and a JAX that has Pallas' back end for Triton",
            ),
            (c.dtype != "bfloat16", f"needs dtype=bfloat16, not {c.dtype}"),
            (c.head_dim > 256, f"needs a head dim up to 256, not {c.head_dim}"),
        ],
        "xla": [(c.attention_dropout_rate, no_dropout)],
        "splash": [
            (platform != "tpu", "needs a TPU"),
            (c.attention_dropout_rate, no_dropout),
            (c.block_size % 128, lengths),
        ],
    }
    return next((reason for applies, reason in limits.get(backend, []) if applies), "")


def self_test(c: Config, backend: str) -> str:
    """Compare a back end with the reference on a small problem; return the failure, or ""."""
    shape = (1, min(c.block_size, 256), c.n_head, c.head_dim)
    q = jax.random.normal(jax.random.key(0), shape, c.dtype)
    k = q[:, :, : c.kv_heads]
    halves_BT = (jnp.arange(shape[1])[None] >= shape[1] // 2).astype(jnp.int32)
    dropout = Dropout(c.attention_dropout_rate, jax.random.split(jax.random.key(1), 1))
    options: dict[str, Any] = {"causal": c.causal, "window": c.sliding_window}
    options["dropout"] = dropout.bind(0, DropoutSite.ATTENTION_WEIGHTS)
    options["segment_ids_BT"] = halves_BT if c.document_mask else None

    def loss(q: jax.Array, k: jax.Array, backend: str) -> jax.Array:
        out = dot_product_attention(q, k, k, backend=backend, **options)
        return jnp.square(out.astype(jnp.float32)).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    try:
        got, want = gradient(q, k, backend), gradient(q, k, "reference")
    except Exception as error:  # drivers, libraries and compilers raise many types
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if not np.abs(a - b).max() <= 0.05 * np.abs(b).max():  # `not`, because it may be nan
            return "its result differs from the reference"
    return ""
