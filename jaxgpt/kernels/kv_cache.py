"""The cache of keys and values for decoding, and attention that reads it.

B batch, N heads, K key-value heads, H head dim; R = B K cache rows, Q = N / K query heads a row,
S cached positions, W tokens of a chunk.

A row is a sequence and one of its key-value heads, because products take that shape as it lies:
XLA:CPU writes arrays of another shape twice. Tokens are decoded a chunk at a time. Meanwhile the
past is only read, and the chunk's keys and values are kept apart: nothing large is written or
copied for a token, and a token's place in the chunk is the same in every sequence.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels.attention import accum_dtype, attention_mask


class KV(NamedTuple):
    """Keys and values of one layer."""

    k_RSH: jax.Array
    v_RSH: jax.Array


class KVCache(NamedTuple):
    """Keys and values of one layer: of the past, and of the chunk that follows it."""

    past: KV
    chunk: KV


class DecodePosition(NamedTuple):
    """Where the decoded tokens are: number `step` of a chunk that begins at `start` [B]."""

    start_B: jax.Array
    step: jax.Array


def empty_cache(rows: int, past: int, chunk: int, head_dim: int, dtype) -> KVCache:
    """Return zeros for `past` positions and a chunk."""

    def empty(length: int) -> KV:
        zeros_RSH = jnp.zeros((rows, length, head_dim), dtype)
        return KV(zeros_RSH, zeros_RSH)

    return KVCache(empty(past), empty(chunk))


def append(
    cache: KVCache | None, k_BTKH: jax.Array, v_BTKH: jax.Array, position: DecodePosition | None
) -> KVCache | None:
    """Write the tokens' keys and values into the chunk at `position`, else into the past."""
    if cache is None:
        return None
    if position is None:
        return cache._replace(past=_write(cache.past, k_BTKH, v_BTKH, 0))
    return cache._replace(chunk=_write(cache.chunk, k_BTKH, v_BTKH, position.step))


def _write(kv: KV, k_BTKH: jax.Array, v_BTKH: jax.Array, start: int | jax.Array) -> KV:
    def write(into_RSH: jax.Array, x_BTKH: jax.Array) -> jax.Array:
        x_BKTH = x_BTKH.swapaxes(1, 2).astype(into_RSH.dtype)
        x_RTH = x_BKTH.reshape(-1, *x_BKTH.shape[2:])
        return jax.lax.dynamic_update_slice_in_dim(into_RSH, x_RTH, start, axis=1)

    return KV(write(kv.k_RSH, k_BTKH), write(kv.v_RSH, v_BTKH))


def flush_chunk(cache: KVCache, start_B: jax.Array) -> KV:
    """Return the past with the chunk written into it, from position `start` on."""

    def write(past_RSH: jax.Array, chunk_RWH: jax.Array) -> jax.Array:
        past_BKSH = past_RSH.reshape(len(start_B), -1, *past_RSH.shape[1:])
        chunk_BKWH = chunk_RWH.reshape(len(start_B), -1, *chunk_RWH.shape[1:])
        update = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        return update(past_BKSH, chunk_BKWH, start_B).reshape(past_RSH.shape)

    return KV(*map(write, cache.past, cache.chunk))


def decode_attention(
    q_B1NH: jax.Array, cache: KVCache, position: DecodePosition, window: int
) -> jax.Array:
    """Attend from one query per sequence to its past and to the chunk up to itself."""
    B, _, N, H = q_B1NH.shape
    R, S, _ = cache.past.k_RSH.shape
    W = cache.chunk.k_RSH.shape[1]
    start_R1 = jnp.repeat(position.start_B, R // B)[:, None]
    past_RS = jnp.broadcast_to(jnp.arange(S), (R, S))
    # positions from the chunk's first on are not of the past
    past_RS = jnp.where(past_RS < start_R1, past_RS, jnp.iinfo(past_RS.dtype).max)
    key_RS = jnp.concatenate([past_RS, start_R1 + jnp.arange(W)], axis=1)
    mask_RS = attention_mask(start_R1 + position.step, key_RS, True, window)
    product = partial(jnp.einsum, preferred_element_type=accum_dtype(q_B1NH))
    q_RQH = q_B1NH.reshape(R, -1, H) * H**-0.5
    scores = [product("RQH,RSH->RQS", q_RQH, part.k_RSH) for part in cache]
    scores_RQS = jnp.where(mask_RS[:, None], jnp.concatenate(scores, axis=2), -jnp.inf)
    weights_RQS = jnp.exp(scores_RQS - scores_RQS.max(-1, keepdims=True))
    weights = jnp.split(weights_RQS.astype(cache.past.v_RSH.dtype), [S], axis=2)
    o_RQH = sum(
        product("RQS,RSH->RQH", part_RQS, part.v_RSH)
        for part_RQS, part in zip(weights, cache, strict=True)
    )
    o_RQH /= weights_RQS.sum(-1, keepdims=True)
    return o_RQH.astype(cache.past.v_RSH.dtype).reshape(B, 1, N, H)
