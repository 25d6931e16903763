"""What makes decoding fast and changes no token: weights, devices, lengths, random draws.

Each docstring names the plain reference first. Most variants are for a CPU, where a decoding step
spends its time on reading weights and on starting small operations.
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

SHARED_READ_BYTES = 1 << 27  # a CPU's cores read larger weights together, not each its own copy


# ---- weights ---------------------------------------------------------------------------------


def compute_dtype_reference(dtype: str) -> str:
    """Compute in the config's dtype."""
    return dtype


def compute_dtype_cpu(dtype: str) -> str:
    """Compute bfloat16 in float32: XLA:CPU emulates bfloat16 arithmetic."""
    return "float32" if dtype == "bfloat16" else dtype


def weights_for(
    dtype: str, compute_dtype: str, params: Any, *, cast: Callable, pack: Callable
) -> tuple[Any, Any]:
    """Return weights to decode a batch with, and to decode a single sequence with.

    Reference: `cast(params, dtype)` for both. Where bfloat16 computes in float32, a batch gets
    float32. A single sequence gets two bfloat16 numbers per word by `pack(params)`, because
    reading the weights takes most of its time.
    """
    params = cast(params, dtype)
    if compute_dtype == dtype:
        return params, params
    params = cast(params, compute_dtype)
    return params, pack(params)


def pack_weights(model: nnx.Module) -> Any:
    """Pack the weight of every module that has an `equation`, by `linear.pack_bf16`."""
    modules: Any = nnx.iter_modules(model)
    for _, module in modules:
        if getattr(module, "equation", ""):
            packed = pack_bf16(module.equation, module.kernel[...])
            module.kernel.set_value(packed)
    return nnx.to_pure_dict(nnx.split(model)[1])


# ---- devices ---------------------------------------------------------------------------------


def max_replicas_reference(params: Any) -> int:
    """Let every local device decode sequences of its own."""
    return jax.local_device_count()


def max_replicas_cpu(params: Any) -> int:
    """Keep large weights on one device, whose operations use all cores.

    A CPU's devices are its cores, on one memory bus.
    """
    size = sum(p.nbytes for p in jax.tree.leaves(params))
    return 1 if size > SHARED_READ_BYTES else jax.local_device_count()


def data_parallel_jit(merge: Callable, function: Callable) -> Callable:
    """Jits `run(mesh, options, params, donated, *rows)`.

    Reference: `function(merge(params), *donated, *rows, *options)`. Each device of the mesh runs
    its own sequences, which are the first axis of every array but `params`.
    """

    def run(mesh: Mesh, options: tuple, params: Any, donated: tuple, *rows: Any):
        def local(params: Any, donated: tuple, *rows: Any):
            return function(merge(params), *donated, *rows, *options)

        by_sequence = PartitionSpec("data")
        in_specs = PartitionSpec(), by_sequence, *(by_sequence for _ in rows)
        specs = {"in_specs": in_specs, "out_specs": by_sequence}
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(params, donated, *rows)

    return jax.jit(run, static_argnums=(0, 1), donate_argnums=3)


def prefill_len(lengths: np.ndarray, block_size: int) -> int:
    """How many tokens to prefill for texts of these lengths. Reference: `block_size`.

    A power of two, because each length is compiled; 0 if every text is one token.
    """
    cached = int(lengths.max()) - 1
    return min(block_size, 1 << (cached - 1).bit_length()) if cached else 0


def kv_len(lengths: np.ndarray, block_size: int) -> int:
    """How many cached positions a chunk attends to. Reference: `block_size`.

    One of at most four lengths, because each is compiled. Five eighths of the block, not a half:
    XLA:CPU reads 512 of 1,024 positions with one core, slower than 640.
    """
    least = max(128, int(lengths.max()) - 1)
    buckets = block_size // 8, block_size // 4, block_size * 5 // 8
    return next((length for length in buckets if length >= least), block_size)


def uniform_draw(key_data: jax.Array, number: jax.Array) -> jax.Array:
    """The reference: the `number`-th uniform draw in (0, 1] of a sequence with this key."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number)
    return 1 - jax.random.uniform(key)


def uniform_draws(keys_B: jax.Array, first_B: jax.Array, count: int) -> jax.Array:
    """`uniform_draw` for each sequence's next `count` draws, float32 [n, B].

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
