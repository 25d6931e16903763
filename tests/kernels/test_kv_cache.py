"""The cache of keys and values, and decoding from it, against attention over whole sequences."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt as ref

from jaxgpt.kernels.kv_cache import (
    KV,
    DecodePosition,
    KVCache,
    decode_attention,
    empty_cache,
    flush_chunk,
    update_kv,
)

B, K, H, ROOM, CHUNK = 2, 2, 4, 12, 3
START_B = np.array([5, 2])


def filled_cache() -> tuple[KVCache, np.ndarray, np.ndarray]:
    """A cache of eight positions, a chunk of which begins at `START_B`, and its keys and values."""
    k_BSKH, v_BSKH = np.random.default_rng(0).standard_normal((2, B, 8, K, H)).astype(np.float32)
    cache = empty_cache(B * K, ROOM, CHUNK, H, "float32")
    past = update_kv(cache.past, jnp.array(k_BSKH), jnp.array(v_BSKH), 0)
    chunk = cache.chunk
    for step in range(CHUNK):
        at = np.arange(B), START_B + step
        chunk = update_kv(
            chunk, jnp.array(k_BSKH[at][:, None]), jnp.array(v_BSKH[at][:, None]), step
        )
    return KVCache(past, chunk), k_BSKH, v_BSKH


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("heads", [K, 3 * K])
@pytest.mark.parametrize("step", [0, 2])
def test_decoding_is_the_attention_of_the_last_query(step, heads, window):
    cache, k_BSKH, v_BSKH = filled_cache()
    q_B1NH = np.random.default_rng(1).standard_normal((B, 1, heads, H)).astype(np.float32)
    position = DecodePosition(jnp.array(START_B), jnp.int32(step))
    got = decode_attention(jnp.array(q_B1NH), cache, position, window, 0.3)
    for b, end in enumerate(START_B + step + 1):
        one = slice(b, b + 1)
        k, v = k_BSKH[one, :end], v_BSKH[one, :end]
        want = ref.attention(q_B1NH[one], k, v, scale=0.3, window=window)
        np.testing.assert_allclose(got[one], want, atol=1e-5)


def test_a_flushed_chunk_is_part_of_the_past():
    cache, _, _ = filled_cache()
    marked = KV(*(jnp.full_like(x, i) for i, x in enumerate(cache.chunk, start=7)))
    flushed = flush_chunk(cache._replace(chunk=marked), jnp.array(START_B))
    for new_RSH, old_RSH, mark in zip(flushed, cache.past, (7, 8), strict=True):
        want = np.array(old_RSH).reshape(B, K, ROOM, H)
        for b, start in enumerate(START_B):
            want[b, :, start : start + CHUNK] = mark
        np.testing.assert_array_equal(new_RSH, want.reshape(B * K, ROOM, H))


def test_a_half_width_cache_is_read_in_float32():
    cache, k_BSKH, v_BSKH = filled_cache()
    half = KVCache(*(KV(*(x.astype(jnp.bfloat16) for x in part)) for part in cache))
    q_B1NH = jnp.ones((B, 1, K, H), jnp.bfloat16)
    got = decode_attention(q_B1NH, half, DecodePosition(jnp.array(START_B), jnp.int32(2)), 0, 0.3)
    assert got.dtype == jnp.bfloat16
    want = ref.attention(np.ones((1, 1, K, H)), k_BSKH[:1, :8], v_BSKH[:1, :8], scale=0.3)
    np.testing.assert_allclose(np.asarray(got[:1], np.float32), want, atol=0.03)
