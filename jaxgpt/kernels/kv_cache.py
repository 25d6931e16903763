"""The cache of keys and values for decoding, and attention that reads it.

B batch, N heads, K key-value heads, H head dim; R = B K cache rows, Q = N / K query heads per row,
S cached positions, W tokens of a chunk, A = S + W keys that a query may see.

A row holds one key-value head of one sequence. Products read this layout directly; XLA:CPU writes
other layouts twice. While a chunk of tokens is decoded, the past is only read, and the chunk's keys
and values are kept apart. So no token writes or copies a large array, and a token's place in the
chunk is the same in every sequence (docs/performance.md, "Chunked KV cache").
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.kernels.attention import AttentionOptions, attention_mask
from jaxgpt.kernels.platform import accum_dtype


class KV(NamedTuple):
    """Keys and values of one layer, in the compute dtype."""

    k_RSH: jax.Array
    v_RSH: jax.Array


class KVCache(NamedTuple):
    """Keys and values of one layer: those of the past, and those of the current chunk."""

    past: KV
    chunk: KV


class DecodePosition(NamedTuple):
    """Positions of the decoded tokens: token `step` of a chunk that begins at `start_B`."""

    start_B: jax.Array  # int32, position of each chunk's first token
    step: jax.Array  # integer scalar, from 0 to the chunk's length - 1


def empty_cache(rows: int, past: int, chunk: int, head_dim: int, dtype) -> KVCache:
    """Return a cache of zeros for `past` positions and `chunk` tokens."""

    def empty(length: int) -> KV:
        zeros_RSH = jnp.zeros((rows, length, head_dim), dtype)
        return KV(zeros_RSH, zeros_RSH)

    return KVCache(empty(past), empty(chunk))


def update_cache(
    cache: KVCache | None, k_BTKH: jax.Array, v_BTKH: jax.Array, position: DecodePosition | None
) -> KVCache | None:
    """Return the cache with the keys and values of new tokens.

    Decoding writes them to the chunk, at `position.step`. Without a position (prefill), they go to
    the beginning of the past. Without a cache, the result is None.
    """
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
    """Return the past with the chunk written into it, from each sequence's `start` on."""

    def write(past_RSH: jax.Array, chunk_RWH: jax.Array) -> jax.Array:
        past_BKSH = past_RSH.reshape(len(start_B), -1, *past_RSH.shape[1:])
        chunk_BKWH = chunk_RWH.reshape(len(start_B), -1, *chunk_RWH.shape[1:])
        update = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        return update(past_BKSH, chunk_BKWH, start_B).reshape(past_RSH.shape)

    return KV(*map(write, cache.past, cache.chunk))


def decode_attention(
    q_B1NH: jax.Array, cache: KVCache, position: DecodePosition, options: AttentionOptions
) -> jax.Array:
    """Attend from one query per sequence to its past, and to the chunk up to `position`.

    Return [B, 1, N, H] in the cache's dtype.
    """
    B, _, N, H = q_B1NH.shape
    R, S, _ = cache.past.k_RSH.shape
    W = cache.chunk.k_RSH.shape[1]
    start_R1 = jnp.repeat(position.start_B, R // B)[:, None]
    past_RS = jnp.broadcast_to(jnp.arange(S), (R, S))
    # Cached positions after the chunk's start are unused or stale, so no query may attend to them
    # (sampling is always causal).
    past_RS = jnp.where(past_RS < start_R1, past_RS, jnp.iinfo(past_RS.dtype).max)
    key_RA = jnp.concatenate([past_RS, start_R1 + jnp.arange(W)], axis=1)
    mask_RA = attention_mask(start_R1 + position.step, key_RA, options.causal, options.window)
    product = partial(jnp.einsum, preferred_element_type=accum_dtype(q_B1NH))
    q_RQH = q_B1NH.reshape(R, -1, H) * options.scale
    scores = [product("RQH,RSH->RQS", q_RQH, part.k_RSH) for part in cache]
    scores_RQA = jnp.where(mask_RA[:, None], jnp.concatenate(scores, axis=2), -jnp.inf)
    weights_RQA = jnp.exp(scores_RQA - scores_RQA.max(-1, keepdims=True))
    weights = jnp.split(weights_RQA.astype(cache.past.v_RSH.dtype), [S], axis=2)
    o_RQH = sum(
        product("RQS,RSH->RQH", part_RQS, part.v_RSH)
        for part_RQS, part in zip(weights, cache, strict=True)
    )
    o_RQH /= weights_RQA.sum(-1, keepdims=True)
    return o_RQH.astype(cache.past.v_RSH.dtype).reshape(B, 1, N, H)
