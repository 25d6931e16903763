"""Causal attention over a head axis: one meaning, several back ends.

B batch, T query length, S key length, N heads, K KV heads, G = N / K query heads a KV head,
H head width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Dropout = Callable[[jax.Array], jax.Array]


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    window: int = 0,
    mask_BTS: jax.Array | None = None,
    dropout: Dropout | None = None,
    backend: str = "reference",
) -> jax.Array:
    """Softmax attention, scaled by 1/sqrt(H) -> [B, T, N, H] in q's type.

    Query head n looks at KV head n // (N // K). `causal` hides keys after the query, `window`
    keys further back than that many (the query's own included; 0 is no bound). A cache knows
    better which of its keys are there: it passes `mask_BTS` (True may look) instead of the two.
    `dropout` acts on the attention weights. Scores and softmax are float32 at least.
    Vaswani et al. 2017; grouped heads: Ainslie et al. 2023.
    """
    plain = mask_BTS is None and dropout is None
    if backend in ("xla", "cudnn") and plain:
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            is_causal=causal,
            local_window_size=(window - 1, 0) if window else None,
            implementation=backend,
        )
    if backend == "splash" and plain:
        return _splash(q_BTNH, k_BSKH, v_BSKH, causal=causal, window=window)
    if mask_BTS is None:
        mask_BTS = attention_mask(q_BTNH.shape[1], causal, window)[None]
    return _reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, dropout)


def attention_mask(length: int, causal: bool, window: int) -> jax.Array:
    """Which key a query may look at, [T, T], True where it may."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)
    allowed = (key <= query) if causal else jnp.ones((length, length), bool)
    return allowed & (key > query - window) if window else allowed


def _reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, dropout: Dropout | None) -> jax.Array:
    """The equations as they stand; every option; the [T, S] weights are held in memory."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    if dropout is not None:
        weights_BKGTS = dropout(weights_BKGTS)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)



def _splash(q_BTNH, k_BSKH, v_BSKH, *, causal: bool, window: int, interpret: bool = False):
    """JAX's Pallas flash kernel for TPUs, on each device's own sequences and heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def local(q_BTNH, k_BSKH, v_BSKH):
        (_, T, N, H), heads_first = q_BTNH.shape, partial(jnp.swapaxes, axis1=1, axis2=2)
        mask = splash.FullMask((T, T))
        if causal:
            mask = splash.LocalMask((T, T), (window - 1 if window else None, 0), 0)
        block = next(size for size in (512, 256, 128) if T % size == 0)
        names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute "
        names += "block_q_dq block_kv_dq"
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * N),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash.BlockSizes(**dict.fromkeys(names.split(), block)),
            interpret=interpret,
        )
        q_BTNH = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)  # the kernel does not scale
        return heads_first(jax.vmap(kernel)(*map(heads_first, (q_BTNH, k_BSKH, v_BSKH))))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q_BTNH, k_BSKH, v_BSKH)
    spec = PartitionSpec(("data", "fsdp"), None, "tensor", None)
    mapped = jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)
    return mapped(q_BTNH, k_BSKH, v_BSKH)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rotary positions: turns each pair (x[i], x[i + H/2]) by an angle that grows with position.

    Su et al. 2021, base 10,000, in the half-split form. Angles are float32 at least.
    """
    half = x_BTNH.shape[-1] // 2
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    angle_BT1H = (positions_BT[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)).astype(wide)
    sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
    a, b = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
