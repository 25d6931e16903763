"""Token lookup, and positions added to the residual stream.

B batch, T length, D embedding, V vocabulary, G groups of sequences.
"""

import math

import jax
import jax.numpy as jnp

from jaxgpt.kernels.linear import unpack_bf16
from jaxgpt.kernels.platform import is_partitioned

GROUP = 16  # sequences whose position gradients are summed in one kernel


def embed_reference(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Return the table's row of each token, [B, T, D]."""
    return table_VD[tokens_BT]


def embed_cpu(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Also read a tied table that `linear.pack_bf16` packed for the output map, [D / 2, V]."""
    if table_VD.dtype == jnp.uint32:
        return jnp.moveaxis(jnp.concatenate(unpack_bf16(table_VD[:, tokens_BT])), 0, -1)
    return embed_reference(table_VD, tokens_BT)


def add_positions_reference(x_BTD: jax.Array, table_TD: jax.Array) -> jax.Array:
    """Add a row of the table at each position of every sequence."""
    return x_BTD + table_TD


def add_positions_gpu(x_BTD: jax.Array, table_TD: jax.Array) -> jax.Array:
    """Sum the table's gradient in groups of at most 16 sequences.

    XLA lays out 32 numbers or more that are summed as neighbours. In this gradient the sequences
    are summed: the whole stream would have B innermost, and every norm would stride over D
    (performance.md, "positions' gradient").
    """
    B, mesh = len(x_BTD), jax.sharding.get_abstract_mesh()
    shards = mesh.shape["data"] * mesh.shape["fsdp"] if is_partitioned() else 1
    groups = B // math.gcd(GROUP, B // shards)
    rows_GTD = jnp.broadcast_to(table_TD, (groups, *table_TD.shape))
    rows_GTD = jax.lax.optimization_barrier(rows_GTD)
    x_GBTD = x_BTD.reshape(groups, -1, *table_TD.shape)
    return (x_GBTD + rows_GTD[:, None]).reshape(x_BTD.shape)
