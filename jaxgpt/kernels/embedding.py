"""Token embedding, and position embedding added to the residual stream.

B batch, T length, D embedding, V vocabulary, G groups of sequences.
"""

import math

import jax
import jax.numpy as jnp

from jaxgpt.kernels.linear import unpack_bf16
from jaxgpt.kernels.platform import is_partitioned

GROUP = 16  # sequences over which the position gradient is summed at a time


def embed_reference(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Return the table's row of each token, [B, T, D] in the table's dtype."""
    return table_VD[tokens_BT]


def embed_cpu(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Compute `embed_reference`, also from a tied table [D / 2, V] of `linear.pack_bf16`."""
    # (docs/performance.md, "Packed bfloat16 weights")
    if table_VD.dtype == jnp.uint32:  # packed, [D / 2, V]
        return jnp.moveaxis(jnp.concatenate(unpack_bf16(table_VD[:, tokens_BT])), 0, -1)
    return embed_reference(table_VD, tokens_BT)


def add_positions_reference(x_BTD: jax.Array, table_TD: jax.Array) -> jax.Array:
    """Add row t of the table at position t of every sequence."""
    return x_BTD + table_TD


def add_positions_gpu(x_BTD: jax.Array, table_TD: jax.Array) -> jax.Array:
    """Compute `add_positions_reference` with a gradient that sums groups of at most 16 sequences.

    From 32 summed elements on, XLA makes the summed axis the innermost in memory. A sum over all
    sequences would put B innermost in the whole residual stream, and norms would read it with a
    stride (docs/performance.md, "Position gradients in groups").
    """
    B, mesh = len(x_BTD), jax.sharding.get_abstract_mesh()
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if is_partitioned() else 1
    groups = B // math.gcd(GROUP, B // shards)
    rows_GTD = jnp.broadcast_to(table_TD, (groups, *table_TD.shape))
    rows_GTD = jax.lax.optimization_barrier(rows_GTD)
    x_GBTD = x_BTD.reshape(groups, -1, *table_TD.shape)
    return (x_GBTD + rows_GTD[:, None]).reshape(x_BTD.shape)
