"""Causal attention over a head axis: the module, its KV cache, and one function's back ends.

B batch, T query length, S key length, D embedding, N heads, K KV heads, G = N / K query heads a
KV head, H head width, C the parts of a fused map (query, key, value).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from jaxgpt.config import Config
from jaxgpt.layers import ATTENTION, WEIGHTS, Dropout, Linear, Norm, residual_std, split_batch


class KeysValues(NamedTuple):
    """What one layer holds of S positions; a row P is a sequence and one of its KV heads.

    That is the shape of the products they are for: XLA:CPU writes arrays of another twice.
    """

    k_PSH: jax.Array
    v_PSH: jax.Array


class Cache(NamedTuple):
    """Keys and values of one layer: of the past, and of a chunk of tokens that goes on from it.

    While the chunk is decoded, the past is only read. So nothing large is written or laid out
    anew for a token, and its place in the chunk is the same in every sequence.
    """

    past: KeysValues
    chunk: KeysValues

    def append(self, start_B: jax.Array) -> KeysValues:
        """The past with the chunk in it, from position `start` on."""

        def put(past_PSH: jax.Array, chunk_PCH: jax.Array) -> jax.Array:
            past_BKSH, chunk_BKCH = (
                x.reshape(len(start_B), -1, *x.shape[1:]) for x in (past_PSH, chunk_PCH)
            )
            update = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
            return update(past_BKSH, chunk_BKCH, start_B).reshape(past_PSH.shape)

        return KeysValues(*map(put, self.past, self.chunk))


class Place(NamedTuple):
    """Where the tokens being decoded are: the `step`-th of a chunk that began at `start`."""

    start_B: jax.Array
    step: jax.Array


class Attention(nnx.Module):
    """Multi-head attention with one fused map for query, key and value.

    The fused kernel [D, 3, N, H] holds the maps of N separate heads side by side, and the output
    kernel [N, H, D] sums over heads what separate heads would concatenate and then map.
    With `cross`, keys and values are those of another sequence, and so have a map of their own.
    """

    def __init__(self, c: Config, *, cross: bool = False, rngs: nnx.Rngs):
        D, N, K, H = c.n_embd, c.n_head, c.kv_heads, c.head_dim
        linear = partial(Linear, init=c.init, rngs=rngs)
        qkv_linear = partial(linear, bias=c.bias and c.qkv_bias)
        self.is_fused = K == N and not cross
        if self.is_fused:
            self.qkv = qkv_linear("BTD,DCNH->BTCNH", D, 3, N, H)
        else:
            self.q = qkv_linear("BTD,DNH->BTNH", D, N, H)
            self.kv = qkv_linear("BTD,DCKH->BTCKH", D, 2, K, H)
        if c.out_projection:
            self.out = linear("BTNH,NHD->BTD", N, H, D, bias=c.bias, std=residual_std(c))
        if c.qk_norm:
            self.q_norm, self.k_norm = (Norm(c, H, "H", kind="rmsnorm") for _ in range(2))
        if c.value_residual:
            self.value_mix = nnx.Param(jnp.array(0.5), axes="")
        self.config = c

    def __call__(
        self,
        x_BTD: jax.Array,
        v_first: jax.Array | None,
        layer: int | jax.Array,
        drop: Dropout,
        cache: Cache | None,
        place: Place | None,
        documents_BT: jax.Array | None = None,
        source_BSD: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, Cache | None]:
        """-> the branch [B, T, D], the first layer's values, and the cache with these T in it.

        `source_BSD` is the other sequence of a `cross` module: every query sees all of it, at no
        position, so neither `causal`, `sliding_window` nor rotation applies.
        """
        c, is_cross = self.config, source_BSD is not None
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, source_BSD)
        if c.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if c.position == "rope" and not is_cross:
            positions_BT = positions(x_BTD.shape[1], place)
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT), rotate(k_BTKH, positions_BT)
        if c.value_residual:  # Zhou et al. 2024, "Value Residual Learning"
            v_first = v_BTKH if v_first is None else jnp.where(layer == 0, v_BTKH, v_first)
            mix = self.value_mix[...].astype(v_BTKH.dtype)
            v_BTKH = (1 - mix) * v_BTKH + mix * v_first
        scale = c.n_embd**-0.5 if c.score_scale == "embedding" else c.head_dim**-0.5
        window = 0 if is_cross else c.sliding_window
        if cache is not None and place is not None:
            cache = cache._replace(chunk=_write(cache.chunk, k_BTKH, v_BTKH, place.step))
            o_BTNH = _attend_cached(q_BTNH, cache, place, window, scale)
        else:
            if cache is not None:
                cache = cache._replace(past=_write(cache.past, k_BTKH, v_BTKH, 0))
            is_dropped = drop.rate and c.attention_dropout
            dropout = Partial(type(drop).__call__, drop, site=WEIGHTS) if is_dropped else None
            o_BTNH = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                causal=c.causal and not is_cross,
                window=window,
                documents_BT=documents_BT,
                dropout=dropout,
                backend=c.attention,
                scale=scale,
            )
        if not c.out_projection:  # heads split over `tensor` meet first: on a mesh of three axes
            # the XLA of jax 0.10.2 gets the gradient of a reshape that splits them wrong
            return split_batch(o_BTNH).reshape(x_BTD.shape), v_first, cache
        return drop(self.out(o_BTNH), ATTENTION), v_first, cache

    def project(
        self, x_BTD: jax.Array, source_BSD: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x, and the other sequence if there is one -> q [B, T, N, H], k and v [B, S, K, H]."""
        if self.is_fused:
            q, k, v = jnp.split(self.qkv(x_BTD), 3, axis=2)  # one concatenation in the gradient
            return q.squeeze(2), k.squeeze(2), v.squeeze(2)
        k, v = jnp.split(self.kv(x_BTD if source_BSD is None else source_BSD), 2, axis=2)
        return self.q(x_BTD), k.squeeze(2), v.squeeze(2)


def positions(length: int, place: Place | None) -> jax.Array:
    """Positions of a sequence's tokens, [1 or B, T]: from 0, or that of the one decoded."""
    start_B = jnp.zeros(1, jnp.int32) if place is None else place.start_B + place.step
    return start_B[:, None] + jnp.arange(length)


def _write(into: KeysValues, k_BTKH, v_BTKH, start: int | jax.Array) -> KeysValues:
    def put(into_PSH: jax.Array, x_BTKH: jax.Array) -> jax.Array:
        x_BKTH = x_BTKH.swapaxes(1, 2).astype(into_PSH.dtype)
        x_PTH = x_BKTH.reshape(-1, *x_BKTH.shape[2:])
        return jax.lax.dynamic_update_slice_in_dim(into_PSH, x_PTH, start, axis=1)

    return KeysValues(*map(put, into, (k_BTKH, v_BTKH)))


def _attend_cached(q_B1NH, cache: Cache, place: Place, window: int, scale: float) -> jax.Array:
    """Causal attention of one query a sequence to its past and to the chunk up to itself."""
    (B, _, N, H), (P, S, _), C = q_B1NH.shape, cache.past.k_PSH.shape, cache.chunk.k_PSH.shape[1]
    wide = _wide(q_B1NH)
    start_P1 = jnp.repeat(place.start_B, P // B)[:, None]
    past_PS = jnp.broadcast_to(jnp.arange(S), (P, S))
    # no position of the past is as late as the chunk's first
    past_PS = jnp.where(past_PS < start_P1, past_PS, jnp.iinfo(past_PS.dtype).max)
    key_PS = jnp.concatenate([past_PS, start_P1 + jnp.arange(C)], axis=1)
    query_P1 = start_P1 + place.step
    sees_PS = attention_mask(query_P1, key_PS, True, window)
    q_PGH = q_B1NH.reshape(P, -1, H) * scale
    product = partial(jnp.einsum, preferred_element_type=wide)
    scores = [product("PGH,PSH->PGS", q_PGH, part.k_PSH) for part in cache]
    scores_PGS = jnp.where(sees_PS[:, None], jnp.concatenate(scores, axis=2), -jnp.inf)
    weights_PGS = jnp.exp(scores_PGS - scores_PGS.max(-1, keepdims=True))
    weights = jnp.split(weights_PGS.astype(cache.past.v_PSH.dtype), [S], axis=2)
    o_PGH = sum(
        product("PGS,PSH->PGH", w_PGS, part.v_PSH)
        for w_PGS, part in zip(weights, cache, strict=True)
    )
    o_PGH /= weights_PGS.sum(-1, keepdims=True)
    return o_PGH.astype(cache.past.v_PSH.dtype).reshape(B, 1, N, H)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    window: int = 0,
    documents_BT: jax.Array | None = None,
    dropout: Callable | None = None,
    backend: str = "reference",
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention, scaled by 1/sqrt(H) or `scale` -> [B, T, N, H] in q's type.

    Query head n looks at KV head n // (N // K). `causal` hides keys after the query, `window`
    keys further back than that many (the query's own included; 0 is no bound). A query sees only
    keys with its own number in `documents_BT`, if that is given; not for cudnn.
    `dropout` acts on the attention weights; it is a pytree, as `jax.tree_util.Partial` makes one,
    and linear. Scores and softmax are float32 at least.
    Vaswani et al. 2017; grouped heads: Ainslie et al. 2023.
    """
    (_, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    scale = float(H**-0.5) if scale is None else scale
    same_BTS = None
    if documents_BT is not None:
        same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    if backend in ("xla", "cudnn") and dropout is None:
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=None if same_BTS is None else same_BTS[:, None],
            is_causal=causal,
            local_window_size=(window - 1, 0) if window else None,
            implementation=backend,
            scale=scale,
        )
    if backend == "splash" and dropout is None and T == S and T % 128 == 0:
        how = {"causal": causal, "window": window, "scale": scale}
        return _splash(q_BTNH, k_BSKH, v_BSKH, documents_BT, **how)
    mask_BTS = attention_mask(jnp.arange(T)[:, None], jnp.arange(S), causal, window)[None]
    if same_BTS is not None:
        mask_BTS &= same_BTS
    k_BSNH, v_BSNH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    run = _on_cpu if backend == "cpu" and T == S else _reference
    return run(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout, scale)


def attention_mask(query: jax.Array, key: jax.Array, causal: bool, window: int) -> jax.Array:
    """True where a query may look at a key, by their positions, which broadcast."""
    allowed = (key <= query) | (not causal)
    return allowed & (key > query - window) if window else allowed


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _reference(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    """The equations as they stand; every option; the [T, S] weights are held in memory.

    The gradient is by hand, from weights in the values' type: for a GPU XLA then makes one kernel
    of softmax and dropout, and one of their gradient, and holds nothing else of that size.
    """
    return _reference_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout, scale)[0]


def _reference_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    product = partial(jnp.einsum, preferred_element_type=_wide(q_BTNH))
    scores_BNTS = product("BTNH,BSNH->BNTS", q_BTNH * scale, k_BSNH)
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS).astype(v_BSNH.dtype)
    dropped_BNTS = dropout(weights_BNTS) if dropout else weights_BNTS
    o_BTNH = product("BNTS,BSNH->BTNH", dropped_BNTS, v_BSNH).astype(v_BSNH.dtype)
    return o_BTNH, (q_BTNH, k_BSNH, v_BSNH, weights_BNTS, dropout)


def _reference_bwd(scale: float, saved: tuple, do_BTNH: jax.Array):
    q_BTNH, k_BSNH, v_BSNH, weights_BNTS, dropout = saved
    dropped_BNTS = dropout(weights_BNTS) if dropout else weights_BNTS
    d_dropped_BNTS = jnp.einsum("BTNH,BSNH->BNTS", do_BTNH, v_BSNH)
    d_weights_BNTS = dropout(d_dropped_BNTS) if dropout else d_dropped_BNTS
    product_BNTS = d_weights_BNTS.astype(_wide(q_BTNH)) * weights_BNTS
    d_scores_BNTS = product_BNTS - weights_BNTS * product_BNTS.sum(-1, keepdims=True)
    d_scores_BNTS = d_scores_BNTS.astype(q_BTNH.dtype)
    dq_BTNH = jnp.einsum("BNTS,BSNH->BTNH", d_scores_BNTS, k_BSNH) * scale
    dk_BSNH = jnp.einsum("BNTS,BTNH->BSNH", d_scores_BNTS, q_BTNH) * scale
    dv_BSNH = jnp.einsum("BNTS,BTNH->BSNH", dropped_BNTS, do_BTNH)
    return dq_BTNH, dk_BSNH, dv_BSNH, None, None


_reference.defvjp(_reference_fwd, _reference_bwd)


def _wide(x: jax.Array) -> jax.typing.DTypeLike:
    return jnp.promote_types(x.dtype, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _on_cpu(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    """`_reference` as XLA:CPU runs it fast, both ways: every operand is laid out once.

    Weights are divided by their sum after they have met the values: [T, H] numbers, not [T, S].
    XLA's library takes products of [.., T, S] by [.., S, H] or by [.., H, S] only, and sums over
    the last axis slowly. The gradient is FlashAttention's (Dao et al. 2022, appendix B.4).
    """
    return _on_cpu_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout, scale)[0]


def _on_cpu_fwd(q_BTNH, k_BSNH, v_BSNH, mask_BTS, dropout: Callable | None, scale: float):
    wide = _wide(q_BTNH)
    q_BNTH = jnp.einsum("BTNH->BNTH", q_BTNH.astype(wide) * scale)
    k_BNSH = jnp.einsum("BSNH->BNSH", k_BSNH.astype(wide))
    v_BNHS = jnp.einsum("BSNH->BNHS", v_BSNH.astype(wide))
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH)
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, -jnp.inf)
    weights_BNTS = jnp.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
    sum_BNT = weights_BNTS.sum(-1)
    dropped_BNTS = dropout(weights_BNTS) if dropout else weights_BNTS
    o_BNHT = jnp.einsum("BNHS,BNTS->BNHT", v_BNHS, dropped_BNTS) / sum_BNT[:, :, None]
    saved = q_BNTH, k_BNSH, v_BNHS, weights_BNTS, dropped_BNTS, sum_BNT, o_BNHT, dropout
    return jnp.einsum("BNHT->BTNH", o_BNHT).astype(q_BTNH.dtype), saved


def _on_cpu_bwd(scale: float, saved: tuple, do_BTNH: jax.Array):
    q_BNTH, k_BNSH, v_BNHS, weights_BNTS, dropped_BNTS, sum_BNT, o_BNHT, dropout = saved
    do_BNHT = jnp.einsum("BTNH->BNHT", do_BTNH) / sum_BNT[:, :, None]
    do_BNTH, q_BNHT = (jnp.swapaxes(x, 2, 3) for x in (do_BNHT, q_BNTH))
    # or XLA folds the transposes into products that its library does not take
    do_BNTH, do_BNHT, q_BNHT = jax.lax.optimization_barrier((do_BNTH, do_BNHT, q_BNHT))
    d_weights_BNTS = jnp.einsum("BNTH,BNHS->BNTS", do_BNTH, v_BNHS)
    d_weights_BNTS = dropout(d_weights_BNTS) if dropout else d_weights_BNTS
    d_sum_BNT1 = (do_BNHT * o_BNHT).sum(2)[..., None]
    d_scores_BNTS = weights_BNTS * (d_weights_BNTS - d_sum_BNT1)
    dq_BTNH = jnp.einsum("BNTS,BNSH->BNTH", d_scores_BNTS, k_BNSH).swapaxes(1, 2) * scale
    dk_BSNH = jnp.einsum("BNHT,BNTS->BNHS", q_BNHT, d_scores_BNTS).transpose(0, 3, 1, 2)
    dv_BSNH = jnp.einsum("BNHT,BNTS->BNHS", do_BNHT, dropped_BNTS).transpose(0, 3, 1, 2)
    grads = (x.astype(do_BTNH.dtype) for x in (dq_BTNH, dk_BSNH, dv_BSNH))
    return *grads, None, None


_on_cpu.defvjp(_on_cpu_fwd, _on_cpu_bwd)


def _splash(q, k, v, documents=None, *, causal: bool, window: int, scale: float, interpret=False):
    """JAX's Pallas flash kernel for TPUs, on each device's own sequences and heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def local(q_BTNH, k_BSKH, v_BSKH, documents_BT):
        (_, T, N, _) = q_BTNH.shape
        heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
        mask = splash.FullMask((T, T))
        if causal:
            mask = splash.LocalMask((T, T), (window - 1 if window else None, 0), 0)
        block = next(size for size in (512, 256, 128) if T % size == 0)
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * N),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_kv_compute=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_kv_dkv_compute=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            interpret=interpret,
        )
        q_BTNH = q_BTNH * jnp.asarray(scale, q_BTNH.dtype)  # the kernel does not scale
        segments = None if documents_BT is None else splash.SegmentIds(documents_BT, documents_BT)
        run = cast(Callable, jax.vmap(kernel))
        return heads_first(run(*map(heads_first, (q_BTNH, k_BSKH, v_BSKH)), segments))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k, v, documents)
    spec = PartitionSpec(("data", "fsdp"), None, "tensor", None)
    specs = {"in_specs": (spec, spec, spec, PartitionSpec(spec[0])), "out_specs": spec}
    mapped = jax.shard_map(local, check_vma=False, **specs)
    return mapped(q, k, v, documents)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rotary positions: turns each pair (x[i], x[i + H/2]) by an angle that grows with position.

    Su et al. 2021, base 10,000, in the half-split form. Angles are float32 at least.
    """
    half = x_BTNH.shape[-1] // 2
    wide = _wide(x_BTNH)
    angle_BT1H = (positions_BT[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)).astype(
        wide
    )
    sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
    a, b = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
