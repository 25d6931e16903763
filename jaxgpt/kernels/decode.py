"""Make decoding faster without changing the tokens: weights, devices, lengths and random draws.

Each docstring names its plain reference. Most variants are for a CPU, where a decoding step spends
its time on reading weights and on starting small operations.
B sequences, n draws of one chunk, k candidates.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxgpt.kernels.linear import pack_bf16

SHARED_READ_BYTES = 1 << 27  # a CPU's cores read larger weights together


# ---- weights ---------------------------------------------------------------------------------


def compute_dtype_reference(dtype: str) -> str:
    """Return the dtype to compute in: the config's dtype."""
    return dtype


def compute_dtype_cpu(dtype: str) -> str:
    """Return float32 for bfloat16, because XLA:CPU emulates bfloat16 arithmetic."""
    # (docs/performance.md, "Float32 compute for bfloat16")
    return "float32" if dtype == "bfloat16" else dtype


def weights_for(
    dtype: str, compute_dtype: str, params: Any, *, cast: Callable, pack: Callable
) -> tuple[Any, Any]:
    """Return the weights for a batch, and the weights for a single sequence.

    Reference: `cast(params, dtype)` for both. If `compute_dtype` differs, a batch gets weights in
    that dtype. A single sequence gets two bfloat16 numbers per word from `pack(params)`, because
    reading weights takes most of its time (docs/performance.md, "Packed bfloat16 weights").
    """
    params = cast(params, dtype)
    if compute_dtype == dtype:
        return params, params
    params = cast(params, compute_dtype)
    return params, pack(params)


def pack_weights(model: nnx.Module) -> Any:
    """Return the model's parameters, with packed weights of the modules that have an `equation`."""
    modules: Any = nnx.iter_modules(model)
    for _, module in modules:
        if getattr(module, "equation", ""):
            module.kernel.set_value(pack_bf16(module.equation, module.kernel[...]))
    return nnx.to_pure_dict(nnx.split(model)[1])


# ---- devices ---------------------------------------------------------------------------------


def max_replicas_reference(params: Any) -> int:
    """Return the number of devices that decode different sequences: all local devices."""
    return jax.local_device_count()


def max_replicas_cpu(params: Any) -> int:
    """Return 1 for large weights, because operations of one CPU device use all cores.

    A CPU's devices are its cores, which share one memory bus
    (docs/performance.md, "Batch split over cores").
    """
    size = sum(p.nbytes for p in jax.tree.leaves(params))
    return 1 if size > SHARED_READ_BYTES else jax.local_device_count()


def data_parallel_jit(merge: Callable, function: Callable) -> Callable:
    """Return the jitted function `run(mesh, options, params, donated, *rows)`.

    Reference: `function(merge(params), *donated, *rows, *options)`. Each device of the mesh runs
    its own sequences, which are the first axis of every array except `params`.
    """

    def run(mesh: Mesh, options: tuple, params: Any, donated: tuple, *rows: Any):
        def local(params: Any, donated: tuple, *rows: Any):
            return function(merge(params), *donated, *rows, *options)

        by_sequence = PartitionSpec("data")
        in_specs = PartitionSpec(), by_sequence, *(by_sequence for _ in rows)
        specs = {"in_specs": in_specs, "out_specs": by_sequence}
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(params, donated, *rows)

    run.__name__ = function.__name__  # the program's name in a profile
    return jax.jit(run, static_argnums=(0, 1), donate_argnums=3)


def prefill_len(lengths: np.ndarray, block_size: int) -> int:
    """Return how many tokens to prefill for texts of these lengths. Reference: `block_size`.

    The number is a power of two, because each length is compiled; it is 0 if every text has one
    token (docs/performance.md, "Last token outside the cache").
    """
    cached = int(lengths.max()) - 1
    return min(block_size, 1 << (cached - 1).bit_length()) if cached else 0


def kv_len(lengths: np.ndarray, block_size: int) -> int:
    """Return how many cached positions a chunk attends to. Reference: `block_size`.

    There are at most four lengths, because each is compiled. One is five eighths of the block and
    not a half, because XLA:CPU reads 512 of 1,024 positions with one core and 640 with two
    (docs/performance.md, "Bounded past").
    """
    least = max(128, int(lengths.max()) - 1)
    buckets = block_size // 8, block_size // 4, block_size * 5 // 8
    return next((length for length in buckets if length >= least), block_size)


def uniform_draw(key_data: jax.Array, number: jax.Array) -> jax.Array:
    """Return the reference: draw `number`, uniform in (0, 1], of the sequence with this key."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)
    return 1 - jax.random.uniform(key)


def uniform_draws(keys_B2: jax.Array, first_B: jax.Array, count: int) -> jax.Array:
    """Return `uniform_draw` for each sequence's next `count` draws, float32 [n, B].

    They are made together, because XLA:CPU makes keys in a loop, which takes a third of a step
    (docs/performance.md, "Random numbers per chunk").
    """
    numbers_nB = first_B + jnp.arange(count)[:, None]
    return jax.vmap(jax.vmap(uniform_draw), in_axes=(None, 0))(keys_B2, numbers_nB)


def inverse_cdf(weights_Bk: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Return the first index where the normalised cumulative sum reaches a draw, int32 [B].

    Reference: `searchsorted`. Indices of weight 0 are skipped, because a cumulative sum that is
    computed in parallel may increase there.
    """
    sums_Bk = jnp.where(weights_Bk > 0, weights_Bk.cumsum(-1), 0)
    return (sums_Bk >= uniform_B[:, None] * sums_Bk.max(-1, keepdims=True)).argmax(-1)
