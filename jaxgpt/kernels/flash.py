"""Flash attention for NVIDIA GPUs (Dao 2023, "FlashAttention-2"), with dropout and documents.

No array of T x T elements is made: a kernel computes the weights of a tile of queries and keys
where it needs them. A program handles one tile of queries (or of keys, for their gradients) of one
head, and loops over the tiles of keys (or queries). The softmax uses exp2, so scores are multiplied
by log2(e). The kernels are written in Pallas, and Triton compiles them. On a CPU an interpreter
runs them.

B batch, T length, N heads, K key-value heads, H head dim, which a tile pads to a power of 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxgpt.kernels.attention import AttentionOptions, attention_mask
from jaxgpt.kernels.dropout import keep_mask
from jaxgpt.kernels.triton import call_kernel

LOG2E = math.log2(math.e)
OWN = 64  # positions in a program's own tile
OTHER = 64  # positions in each tile that the program loops over
STAGES = 3  # loads of a loop that are in flight


@dataclass(frozen=True)
class Options:
    """What all kernels need to know about the attention besides its arrays."""

    attention: AttentionOptions
    dropout_rate: float


def forward(q_BTNH, k_BTKH, v_BTKH, extra: dict[str, jax.Array], options: Options) -> list:
    """Return the output [B, T, N, H], and log2 of each row's sum of exponentials [B, N, T].

    `extra` has `first_head` [1], the index of the first head on this device, which the dropout's
    hash needs. It has `segments` [B, T] with documents, and `seeds` [B, 2] with dropout.
    """
    B, T, N, _ = q_BTNH.shape
    results = [q_BTNH, jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
    call = _call(_forward, "flash", (pl.cdiv(T, OWN), B * N), results, options)
    return call(q_BTNH, k_BTKH, v_BTKH, extra)


def backward(q_BTNH, k_BTKH, v_BTKH, extra, o_BTNH, lse_BNT, do_BTNH, options: Options) -> tuple:
    """Return the gradients of q, k and v."""
    B, T, N, _ = q_BTNH.shape
    arrays = q_BTNH, k_BTKH, v_BTKH, extra, lse_BNT, do_BTNH
    grid = pl.cdiv(T, OWN), B * N
    call = _call(_query_gradient, "flash_dq", grid, [q_BTNH, lse_BNT], options)
    dq_BTNH, delta_BNT = call(*arrays, o_BTNH)
    grid = pl.cdiv(T, OWN), B * k_BTKH.shape[2]
    call = _call(_key_gradient, "flash_dkv", grid, [k_BTKH, v_BTKH], options)
    return dq_BTNH, *call(*arrays, delta_BNT)


def _call(kernel: Callable, name: str, grid: tuple, results: Any, options: Options) -> Callable:
    return call_kernel(partial(kernel, options), name, grid, results, stages=STAGES)


# ---- the kernels -----------------------------------------------------------------------------


def _forward(options: Options, q_ref, k_ref, v_ref, extra: dict, o_ref, lse_ref) -> None:
    _, T, N, _ = q_ref.shape
    b, n = jax.lax.div(pl.program_id(1), N), jax.lax.rem(pl.program_id(1), N)
    kv_head = jax.lax.div(n, N // k_ref.shape[2])
    query = pl.program_id(0) * OWN + jnp.arange(OWN)
    q = _load(q_ref, b, query, n)

    def add_keys(i: jax.Array, carry: tuple) -> tuple:
        o, maximum, total = carry
        key = i * OTHER + jnp.arange(OTHER)
        scores = _scores(options, q, _load(k_ref, b, key, kv_head), query, key, b, extra, T)
        new = jnp.maximum(maximum, scores.max(1))
        shrink = jnp.exp2(maximum - new)
        weights = jnp.exp2(scores - new[:, None])
        total = total * shrink + weights.sum(1)
        weights = _dropped(options, weights, query, key, b, n, extra, T)
        v = _load(v_ref, b, key, kv_head)
        return o * shrink[:, None] + triton.dot(weights.astype(v.dtype), v), new, total

    initial = jnp.zeros((OWN, q.shape[1])), jnp.full(OWN, -1e30), jnp.zeros(OWN)
    start, end = _key_tiles(options.attention, pl.program_id(0) * OWN, T)
    o, maximum, total = jax.lax.fori_loop(start, end, add_keys, initial)
    _store(o_ref, b, query, n, o / total[:, None])
    triton.store(lse_ref.at[b, n, query], maximum + jnp.log2(total), mask=query < T)


def _query_gradient(
    options: Options, q_ref, k_ref, v_ref, extra: dict, lse_ref, do_ref, o_ref, dq_ref, delta_ref
) -> None:
    """Write dq, and the sum of do * o over H, which the gradient of the softmax subtracts."""
    _, T, N, _ = q_ref.shape
    b, n = jax.lax.div(pl.program_id(1), N), jax.lax.rem(pl.program_id(1), N)
    kv_head = jax.lax.div(n, N // k_ref.shape[2])
    query = pl.program_id(0) * OWN + jnp.arange(OWN)
    q, do = _load(q_ref, b, query, n), _load(do_ref, b, query, n)
    lse = _load_row(lse_ref, b, n, query)
    delta = (do.astype(jnp.float32) * _load(o_ref, b, query, n).astype(jnp.float32)).sum(1)
    triton.store(delta_ref.at[b, n, query], delta, mask=query < T)

    def add_keys(i: jax.Array, dq: jax.Array) -> jax.Array:
        key = i * OTHER + jnp.arange(OTHER)
        k, v = _load(k_ref, b, key, kv_head), _load(v_ref, b, key, kv_head)
        scores = _scores(options, q, k, query, key, b, extra, T)
        weights = jnp.exp2(scores - lse[:, None])
        d_weights = triton.dot(do, v, trans_b=True)
        d_weights = _dropped(options, d_weights, query, key, b, n, extra, T)
        d_scores = weights * (d_weights - delta[:, None])
        return dq + triton.dot(d_scores.astype(k.dtype), k)

    start, end = _key_tiles(options.attention, pl.program_id(0) * OWN, T)
    dq = jax.lax.fori_loop(start, end, add_keys, jnp.zeros(q.shape))
    _store(dq_ref, b, query, n, dq * options.attention.scale)


def _key_gradient(
    options: Options, q_ref, k_ref, v_ref, extra: dict, lse_ref, do_ref, delta_ref, dk_ref, dv_ref
) -> None:
    _, T, N, _ = q_ref.shape
    K = k_ref.shape[2]
    b, kv_head = jax.lax.div(pl.program_id(1), K), jax.lax.rem(pl.program_id(1), K)
    key = pl.program_id(0) * OWN + jnp.arange(OWN)
    k, v = _load(k_ref, b, key, kv_head), _load(v_ref, b, key, kv_head)

    def add_queries(n: jax.Array, i: jax.Array, carry: tuple) -> tuple:
        """Add what tile i of the queries of head n contributes; tiles are [keys, queries]."""
        dk, dv = carry
        query = i * OTHER + jnp.arange(OTHER)
        q, do = _load(q_ref, b, query, n), _load(do_ref, b, query, n)
        lse, delta = _load_row(lse_ref, b, n, query), _load_row(delta_ref, b, n, query)
        scores = _scores(options, k, q, key, query, b, extra, T, transposed=True)
        weights = jnp.exp2(scores - lse[None])
        drop = lambda x: _dropped(options, x, key, query, b, n, extra, T, transposed=True)
        dv += triton.dot(drop(weights).astype(do.dtype), do)
        d_weights = drop(triton.dot(v, do, trans_b=True))
        d_scores = weights * (d_weights - delta[None])
        return dk + triton.dot(d_scores.astype(q.dtype), q), dv

    start, end = _query_tiles(options.attention, pl.program_id(0) * OWN, T)
    carry = jnp.zeros(k.shape), jnp.zeros(v.shape)
    for i in range(N // K):  # the query heads that share these keys
        add = partial(add_queries, kv_head * (N // K) + i)
        carry = jax.lax.fori_loop(start, end, add, carry)
    _store(dk_ref, b, key, kv_head, carry[0] * options.attention.scale)
    _store(dv_ref, b, key, kv_head, carry[1])


# ---- one tile --------------------------------------------------------------------------------


def _scores(
    options: Options, rows, columns, row, column, b, extra: dict, T: int, transposed: bool = False
) -> jax.Array:
    """Return log2(e) times the masked scores; rows are queries, or keys if `transposed`."""
    scores = triton.dot(rows, columns, trans_b=True) * (options.attention.scale * LOG2E)
    query, key = (column[None], row[:, None]) if transposed else (row[:, None], column[None])
    allowed = attention_mask(query, key, options.attention.causal, options.attention.window)
    allowed &= (key < T) & (query < T)
    if "segments" in extra:
        segment_of = lambda i: triton.load(extra["segments"].at[b, i], mask=i < T, other=0)
        allowed &= segment_of(row)[:, None] == segment_of(column)[None]
    return jnp.where(allowed, scores, -1e30)


def _dropped(
    options: Options, x: jax.Array, row, column, b, n, extra: dict, T: int, transposed: bool = False
) -> jax.Array:
    """Apply the dropout of the weights: the mask of the reference, from the same hash."""
    if not options.dropout_rate:
        return x
    query, key = (column[None], row[:, None]) if transposed else (row[:, None], column[None])
    index = ((extra["first_head"][0] + n) * T + query) * T + key
    seeds = extra["seeds"]
    keep = keep_mask(options.dropout_rate, seeds[b, 0], seeds[b, 1], index.astype(jnp.uint32))
    return jnp.where(keep, x / (1 - options.dropout_rate), 0)


def _key_tiles(attention: AttentionOptions, first: jax.Array, T: int) -> tuple:
    """Return the first tile of keys that queries from `first` attend to, and the end."""
    start, end = 0, pl.cdiv(T, OTHER)
    if attention.causal:
        end = jnp.minimum(end, jax.lax.div(first + OWN + OTHER - 1, OTHER))
    if attention.window:
        start = jax.lax.div(jnp.maximum(first - attention.window + 1, 0), OTHER)
    return start, end


def _query_tiles(attention: AttentionOptions, first: jax.Array, T: int) -> tuple:
    """Return the first tile of queries that attend to keys from `first`, and the end."""
    start, end = 0, pl.cdiv(T, OTHER)
    if attention.causal:
        start = jax.lax.div(first, OTHER)
    if attention.window:
        end = jnp.minimum(end, jax.lax.div(first + OWN + attention.window - 1 + OTHER - 1, OTHER))
    return start, end


def _load(ref, b, position: jax.Array, head) -> jax.Array:
    """Return a tile of one head [positions, H]; what is outside the array is 0."""
    _, T, _, H = ref.shape
    channel = jnp.arange(max(16, pl.next_power_of_2(H)))
    tile = ref.at[b, position[:, None], head, channel[None]]
    return triton.load(tile, mask=(position[:, None] < T) & (channel[None] < H), other=0)


def _load_row(ref, b, head, position: jax.Array) -> jax.Array:
    return triton.load(ref.at[b, head, position], mask=position < ref.shape[2], other=0)


def _store(ref, b, position: jax.Array, head, x: jax.Array) -> None:
    _, T, _, H = ref.shape
    channel = jnp.arange(x.shape[1])
    tile = ref.at[b, position[:, None], head, channel[None]]
    inside = (position[:, None] < T) & (channel[None] < H)
    triton.store(tile, x.astype(ref.dtype), mask=inside)
