"""Softmax attention: the equations, and a fast implementation for each platform.

B batch, T query length, S key length, N heads, K key-value heads, H head dim.
Each implementation maps q [B, T, N, H], k and v [B, S, K, H], all of one dtype, to [B, T, N, H].
Query head n uses key-value head n // (N // K) (grouped queries: Ainslie et al. 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxgpt.kernels.platform import BATCH, accum_dtype, is_partitioned


@dataclass(frozen=True)
class AttentionOptions:
    """Which keys a query attends to, and the factor of the scores."""

    causal: bool
    window: int  # number of keys that a query attends to, its own included; 0 means all
    scale: float


def attention_mask(query: jax.Array, key: jax.Array, causal: bool, window: int) -> jax.Array:
    """Return True where a query attends to a key; `query` and `key` are positions and broadcast."""
    allowed = (key <= query) | (not causal)
    return allowed & (key > query - window) if window else allowed


def full_mask(q_BTNH, k_BSKH, segment_ids_BT: jax.Array | None, o: AttentionOptions) -> jax.Array:
    """Return the mask [1 or B, T, S]; `segment_ids_BT` masks keys of other segments."""
    query_T1 = jnp.arange(q_BTNH.shape[1])[:, None]
    mask_BTS = attention_mask(query_T1, jnp.arange(k_BSKH.shape[1]), o.causal, o.window)[None]
    if segment_ids_BT is not None:
        mask_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return mask_BTS


def _repeat_kv_heads(q_BTNH: jax.Array, *kv: jax.Array) -> list[jax.Array]:
    return [jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in kv]


# ---- the reference ---------------------------------------------------------------------------


def attention_reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    dropout: Callable | None,
    options: AttentionOptions,
) -> jax.Array:
    """Compute softmax(mask(scale q k)) v (Vaswani et al. 2017); supports every option.

    `dropout` acts on the weights [B, N, T, S].
    """
    (v_BSNH,) = _repeat_kv_heads(q_BTNH, v_BSKH)
    weights_BNTS = attention_weights(q_BTNH, k_BSKH, segment_ids_BT, options).astype(v_BSNH.dtype)
    dropped_BNTS = dropout(weights_BNTS) if dropout else weights_BNTS
    product = partial(jnp.einsum, preferred_element_type=accum_dtype(q_BTNH))
    return product("BNTS,BSNH->BTNH", dropped_BNTS, v_BSNH).astype(v_BSNH.dtype)


def attention_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    options: AttentionOptions,
) -> jax.Array:
    """Compute softmax(mask(scale q k)), [B, N, T, S], float32 at least."""
    (k_BSNH,) = _repeat_kv_heads(q_BTNH, k_BSKH)
    mask_BTS = full_mask(q_BTNH, k_BSKH, segment_ids_BT, options)
    product = partial(jnp.einsum, preferred_element_type=accum_dtype(q_BTNH))
    scores_BNTS = product("BTNH,BSNH->BNTS", q_BTNH * options.scale, k_BSNH)
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf))


# ---- GPU without flash attention: a gradient from weights in v's dtype -----------------------


def attention_saved_weights(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, dropout: Callable | None, options: AttentionOptions
) -> jax.Array:
    """Compute `attention_reference` with a gradient from saved weights in v's dtype.

    XLA then makes one GPU kernel of softmax and dropout, and one of their gradient, and keeps no
    other array of that size. `dropout` must be linear and a pytree, as `BoundDropout` is
    (docs/performance.md, "Attention gradient from saved weights").
    """
    k_BSNH, v_BSNH = _repeat_kv_heads(q_BTNH, k_BSKH, v_BSKH)
    mask_BTS = full_mask(q_BTNH, k_BSKH, segment_ids_BT, options)
    return _saved_weights(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout, options.scale)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _saved_weights(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    return _saved_weights_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout, scale)[0]


def _saved_weights_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    # the equations of the reference, once more, so that the reference can be read alone
    product = partial(jnp.einsum, preferred_element_type=accum_dtype(q_BTNH))
    scores_BNTS = product("BTNH,BSNH->BNTS", q_BTNH * scale, k_BSNH)
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS).astype(v_BSNH.dtype)
    dropped_BNTS = dropout(weights_BNTS) if dropout else weights_BNTS
    o_BTNH = product("BNTS,BSNH->BTNH", dropped_BNTS, v_BSNH).astype(v_BSNH.dtype)
    return o_BTNH, (q_BTNH, k_BSNH, v_BSNH, weights_BNTS, dropout)


def _saved_weights_bwd(scale: float, saved: tuple, do_BTNH: jax.Array):
    q_BTNH, k_BSNH, v_BSNH, weights_BNTS, dropout = saved
    dropped_BNTS = dropout(weights_BNTS) if dropout else weights_BNTS
    d_dropped_BNTS = jnp.einsum("BTNH,BSNH->BNTS", do_BTNH, v_BSNH)
    d_weights_BNTS = dropout(d_dropped_BNTS) if dropout else d_dropped_BNTS
    product_BNTS = d_weights_BNTS.astype(accum_dtype(q_BTNH)) * weights_BNTS
    d_scores_BNTS = product_BNTS - weights_BNTS * product_BNTS.sum(-1, keepdims=True)
    d_scores_BNTS = d_scores_BNTS.astype(q_BTNH.dtype)
    dq_BTNH = jnp.einsum("BNTS,BSNH->BTNH", d_scores_BNTS, k_BSNH) * scale
    dk_BSNH = jnp.einsum("BNTS,BTNH->BSNH", d_scores_BNTS, q_BTNH) * scale
    dv_BSNH = jnp.einsum("BNTS,BTNH->BSNH", dropped_BNTS, do_BTNH)
    return dq_BTNH, dk_BSNH, dv_BSNH, None, None


_saved_weights.defvjp(_saved_weights_fwd, _saved_weights_bwd)


# ---- CPU -------------------------------------------------------------------------------------


def attention_cpu(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, dropout: Callable | None, options: AttentionOptions
) -> jax.Array:
    """Compute `attention_reference` with every operand laid out once, forward and backward.

    XLA:CPU's library supports only products of [.., T, S] by [.., S, H] or by [.., H, S]. The
    softmax divides after the product with the values: T x H divisions instead of T x S. The
    gradient is that of FlashAttention (Dao et al. 2022, appendix B.4)
    (docs/performance.md, "Late softmax division" and "Hand-written attention gradient").
    """
    k_BSNH, v_BSNH = _repeat_kv_heads(q_BTNH, k_BSKH, v_BSKH)
    mask_BTS = full_mask(q_BTNH, k_BSKH, segment_ids_BT, options)
    return _cpu(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout, options.scale)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cpu(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    return _cpu_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout, scale)[0]


def _cpu_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    dtype = accum_dtype(q_BTNH)
    q_BNTH = jnp.einsum("BTNH->BNTH", q_BTNH.astype(dtype) * scale)
    k_BNSH = jnp.einsum("BSNH->BNSH", k_BSNH.astype(dtype))
    v_BNHS = jnp.einsum("BSNH->BNHS", v_BSNH.astype(dtype))
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH)
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf)
    weights_BNTS = jnp.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
    sum_BNT = weights_BNTS.sum(-1)
    dropped_BNTS = dropout(weights_BNTS) if dropout else weights_BNTS
    o_BNHT = jnp.einsum("BNHS,BNTS->BNHT", v_BNHS, dropped_BNTS) / sum_BNT[:, :, None]
    saved = q_BNTH, k_BNSH, v_BNHS, weights_BNTS, dropped_BNTS, sum_BNT, o_BNHT, dropout
    return jnp.einsum("BNHT->BTNH", o_BNHT).astype(q_BTNH.dtype), saved


def _cpu_bwd(scale: float, saved: tuple, do_BTNH: jax.Array):
    q_BNTH, k_BNSH, v_BNHS, weights_BNTS, dropped_BNTS, sum_BNT, o_BNHT, dropout = saved
    # the saved weights are not normalised, so the gradient is divided by their sum instead
    do_BNHT = jnp.einsum("BTNH->BNHT", do_BTNH) / sum_BNT[:, :, None]
    do_BNTH = jnp.swapaxes(do_BNHT, 2, 3)
    q_BNHT = jnp.swapaxes(q_BNTH, 2, 3)
    # Without the barrier, XLA folds the transposes into products that its library does not support.
    do_BNTH, do_BNHT, q_BNHT = jax.lax.optimization_barrier((do_BNTH, do_BNHT, q_BNHT))
    d_weights_BNTS = jnp.einsum("BNTH,BNHS->BNTS", do_BNTH, v_BNHS)
    d_weights_BNTS = dropout(d_weights_BNTS) if dropout else d_weights_BNTS
    delta_BNT1 = (do_BNHT * o_BNHT).sum(2)[..., None]
    d_scores_BNTS = weights_BNTS * (d_weights_BNTS - delta_BNT1)
    # the saved q holds the scale, so only its gradient needs it
    dq_BTNH = jnp.einsum("BNTS,BNSH->BNTH", d_scores_BNTS, k_BNSH).swapaxes(1, 2) * scale
    dk_BSNH = jnp.einsum("BNHT,BNTS->BNHS", q_BNHT, d_scores_BNTS).transpose(0, 3, 1, 2)
    dv_BSNH = jnp.einsum("BNHT,BNTS->BNHS", do_BNHT, dropped_BNTS).transpose(0, 3, 1, 2)
    grads = (x.astype(do_BTNH.dtype) for x in (dq_BTNH, dk_BSNH, dv_BSNH))
    return *grads, None, None


_cpu.defvjp(_cpu_fwd, _cpu_bwd)


# ---- XLA's attention, and cuDNN's flash attention --------------------------------------------


def attention_xla(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, dropout: None, options: AttentionOptions, *,
    implementation: Any = "xla",
) -> jax.Array:  # fmt: skip
    """Call `jax.nn.dot_product_attention`, which has no dropout."""
    # (docs/performance.md, "XLA attention" and "Flash attention on GPUs")
    mask_B1TS = None
    if segment_ids_BT is not None:
        mask_B1TS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask_B1TS,
        is_causal=options.causal,
        local_window_size=(options.window - 1, 0) if options.window else None,
        implementation=implementation,
        scale=options.scale,
    )


attention_cudnn = partial(attention_xla, implementation="cudnn")


# ---- NVIDIA GPUs: flash attention with dropout and documents ---------------------------------


def attention_flash(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, dropout: Any, options: AttentionOptions
) -> jax.Array:
    """Compute `attention_reference` without arrays of T x S elements; T must equal S.

    `dropout` is a `BoundDropout`, whose masks the kernels compute themselves
    (docs/performance.md, "Flash attention with dropout and documents").
    """
    extra = {"first_head": jnp.zeros(1, jnp.int32)}
    if segment_ids_BT is not None:
        extra["segments"] = segment_ids_BT
    if dropout is not None:
        extra["seeds"] = dropout.seeds_B2
    rate = 0.0 if dropout is None else dropout.rate
    if not is_partitioned():
        return _flash(q_BTNH, k_BSKH, v_BSKH, extra, options, rate)

    def local(q_BTNH, k_BSKH, v_BSKH, extra: dict) -> jax.Array:
        first_head = jax.lax.axis_index("tensor") * q_BTNH.shape[2]
        extra = extra | {"first_head": first_head[None]}
        return _flash(q_BTNH, k_BSKH, v_BSKH, extra, options, rate)

    heads = PartitionSpec(BATCH, None, "tensor", None)
    per_sequence = {name: PartitionSpec(BATCH) for name in extra}
    in_specs = heads, heads, heads, per_sequence | {"first_head": PartitionSpec()}
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)
    return mapped(q_BTNH, k_BSKH, v_BSKH, extra)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q_BTNH, k_BSKH, v_BSKH, extra: dict, options: AttentionOptions, rate: float):
    return _flash_fwd(q_BTNH, k_BSKH, v_BSKH, extra, options, rate)[0]


def _flash_fwd(q_BTNH, k_BSKH, v_BSKH, extra: dict, options: AttentionOptions, rate: float):
    from jaxgpt.kernels import flash

    flash_options = flash.Options(options, rate)
    o_BTNH, lse_BNT = flash.forward(q_BTNH, k_BSKH, v_BSKH, extra, flash_options)
    return o_BTNH, (q_BTNH, k_BSKH, v_BSKH, extra, o_BTNH, lse_BNT)


def _flash_bwd(options: AttentionOptions, rate: float, saved: tuple, do_BTNH: jax.Array):
    from jaxgpt.kernels import flash

    q_BTNH, k_BSKH, v_BSKH, extra, o_BTNH, lse_BNT = saved
    flash_options = flash.Options(options, rate)
    arrays = q_BTNH, k_BSKH, v_BSKH, extra, o_BTNH, lse_BNT, do_BTNH
    dq_BTNH, dk_BSKH, dv_BSKH = flash.backward(*arrays, flash_options)
    return dq_BTNH, dk_BSKH, dv_BSKH, None


_flash.defvjp(_flash_fwd, _flash_bwd)


# ---- TPU: splash attention -------------------------------------------------------------------


def attention_splash(
    q, k, v, segment_ids, dropout: None, options: AttentionOptions, *, interpret: bool = False
) -> jax.Array:
    """Call JAX's Pallas flash kernel on each device's own sequences and heads.

    T must equal S and be a multiple of 128. There is no dropout
    (docs/performance.md, "Flash attention on TPUs").
    """
    local = partial(_splash_local, options, interpret)
    if not is_partitioned():
        return local(q, k, v, segment_ids)
    spec = PartitionSpec(BATCH, None, "tensor", None)
    in_specs = spec, spec, spec, PartitionSpec(BATCH)
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)
    return mapped(q, k, v, segment_ids)


def _splash_local(
    options: AttentionOptions, interpret: bool, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, T, N, _ = q_BTNH.shape
    heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
    mask = splash.FullMask((T, T))
    if options.causal:
        mask = splash.LocalMask((T, T), (options.window - 1 if options.window else None, 0), 0)
    block = next(size for size in (512, 256, 128) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**blocks),
        interpret=interpret,
    )
    q_BTNH = q_BTNH * jnp.asarray(options.scale, q_BTNH.dtype)  # the kernel does not scale
    segments = None
    if segment_ids_BT is not None:
        segments = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
    run = cast(Callable, jax.vmap(kernel))
    return heads_first(run(*map(heads_first, (q_BTNH, k_BSKH, v_BSKH)), segments))
