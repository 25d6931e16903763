"""What makes decoding fast and changes no token: weights, devices, lengths, uniform draws.

Each function names its plain reference first. Most variants are for a CPU, where a decoding step
spends its time on reading weights and on starting small operations.
B sequences, n draws of one chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

SHARED_READ_BYTES = 1 << 27  # a CPU's cores read larger weights together, not each its own copy
MIN_KV_LEN = 128


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"


# ---- weights ---------------------------------------------------------------------------------


def compute_dtype(dtype: str) -> str:
    """The compute type for a config's `dtype`. Reference: that type.

    XLA:CPU emulates bfloat16 arithmetic, so on a CPU bfloat16 computes in float32.
    """
    return "float32" if dtype == "bfloat16" and _is_cpu() else dtype


def weights_for(dtype: str, params: Any, *, cast: Callable, pack: Callable) -> tuple[Any, Any]:
    """Weights to decode a batch with, and to decode a single sequence with.

    Reference: `cast(params, dtype)` for both. Where bfloat16 computes in float32, a batch gets
    them as float32. A single sequence gets two bfloat16 numbers per word by `pack(params)`,
    because reading the weights takes most of its time.
    """
    params = cast(params, dtype)
    if compute_dtype(dtype) == dtype:
        return params, params
    params = cast(params, compute_dtype(dtype))
    return params, pack(params)


# ---- devices ---------------------------------------------------------------------------------


def num_replicas(batch: int, params: Any) -> int:
    """How many local devices share `batch` sequences evenly. Reference: as many as divide it.

    The devices of a CPU are its cores. They share one memory bus, so large weights stay on one
    device, which all cores then read together.
    """
    limit = jax.local_device_count()
    if _is_cpu() and sum(p.nbytes for p in jax.tree.leaves(params)) > SHARED_READ_BYTES:
        limit = 1
    return next(n for n in range(limit, 0, -1) if batch % n == 0)


def data_parallel_jit(merge: Callable, function: Callable) -> Callable:
    """Jits `run(mesh, options, params, donated, *rows)`.

    Reference: `function(merge(params), *donated, *rows, *options)`. Each device of the mesh runs
    its own sequences, which are the first axis of every array but `params`.
    """

    def run(mesh, options: tuple, params: Any, donated: tuple, *rows: Any):
        def local(params: Any, donated: tuple, *rows: Any):
            return function(merge(params), *donated, *rows, *options)

        replicated, by_sequence = PartitionSpec(), PartitionSpec("data")
        in_specs = replicated, by_sequence, *(by_sequence for _ in rows)
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=in_specs, out_specs=by_sequence, check_vma=False
        )
        return mapped(params, donated, *rows)

    return jax.jit(run, static_argnums=(0, 1), donate_argnums=3)


# ---- lengths ---------------------------------------------------------------------------------


def prefill_len(lengths: np.ndarray, block_size: int) -> int:
    """How many tokens to prefill. Reference: `block_size`.

    A power of two, because each length is compiled; 0 if every text is one token, which decoding
    itself caches.
    """
    cached = int(lengths.max()) - 1
    return min(block_size, 1 << (cached - 1).bit_length()) if cached else 0


def kv_len(lengths: np.ndarray, block_size: int) -> int:
    """How many cached positions a chunk attends to. Reference: `block_size`, masked.

    One of at most four lengths, because each is compiled. Five eighths of the block and not a
    half: XLA:CPU reads 512 of 1,024 positions with one core, slower than 640.
    """
    least = max(MIN_KV_LEN, int(lengths.max()) - 1)
    for length in (block_size // 8, block_size // 4, block_size * 5 // 8):
        if length >= least:
            return length
    return block_size


# ---- random draws ----------------------------------------------------------------------------


def uniform_draw(key_data: jax.Array, number: jax.Array) -> jax.Array:
    """The reference: the `number`-th uniform draw in (0, 1] of a sequence with this key."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)
    return 1 - jax.random.uniform(key)


def uniform_draws(keys_B: jax.Array, first_B: jax.Array, count: int) -> jax.Array:
    """`uniform_draw` of each sequence's next `count` draws, float32 [n, B].

    All at once: XLA:CPU makes keys in a loop, which took a third of a decoding step.
    """
    numbers_nB = first_B + jnp.arange(count)[:, None]
    return jax.vmap(jax.vmap(uniform_draw), in_axes=(None, 0))(keys_B, numbers_nB)


def inverse_cdf(weights_Bk: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index where the normalised cumulative sum reaches a uniform draw, int32 [B].

    Reference: `searchsorted`. Indices of weight 0 never count, because a cumulative sum that is
    taken in parallel may change at them.
    """
    sums_Bk = jnp.where(weights_Bk > 0, weights_Bk.cumsum(-1), 0)
    return (sums_Bk >= uniform_B[:, None] * sums_Bk.max(-1, keepdims=True)).argmax(-1)
