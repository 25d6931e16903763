"""Define the GPT: token ids in, logits out.

Array names end with their axes: B batch, T length, D embedding, N heads, K key-value heads,
H head dim, F MLP width, V vocabulary (padded), L layers, C parts of a fused map (query, key and
value; or gate and up). A parameter keeps its letters as `axes`; sharding.py maps them to the mesh.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import register_dataclass

from jaxgpt import kernels
from jaxgpt.config import Config, ModelConfig
from jaxgpt.kernels.activation import gelu, relu2
from jaxgpt.kernels.attention import AttentionOptions
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.kernels.kv_cache import (
    DecodePosition,
    KVCache,
    decode_attention,
    empty_cache,
    update_cache,
)
from jaxgpt.kernels.linear import LINEAR_OUTPUT, add_bias
from jaxgpt.kernels.position import apply_rope, sinusoids
from jaxgpt.runtime.scopes import name_scopes, scoped
from jaxgpt.sharding import constrain, constrain_batch

INIT_STD = 0.02  # of matrices and embeddings, but see `residual_std` (Radford et al. 2019)
NO_MESH = jax.sharding.AbstractMesh((), ())
OUTPUT_EQUATION = "BTD,VD->BTV"
ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: kernels.gelu_tanh(x),  # at import the platform is not known yet
    "relu": jax.nn.relu,
    "relu2": relu2,
}
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@register_dataclass
@dataclass(frozen=True)
class Context:
    """What a layer needs besides its input: its index, masks and, when sampling, its cache."""

    dropout: Dropout
    layer: int | jax.Array = 0
    segment_ids_BT: jax.Array | None = None
    first_v_BTKH: jax.Array | None = None  # values of the first layer, for `value_residual`
    cache: KVCache | None = None  # of this layer; training has none
    position: DecodePosition | None = None  # only in decoding, with one new token per sequence


class Linear(nnx.Module):
    """An affine map written as an einsum: `BTD,DNH->BTNH` maps the embedding to heads."""

    def __init__(
        self, equation: str, *shape: int, bias: bool, rngs: nnx.Rngs, std: float = INIT_STD
    ):
        self.equation = equation
        axes, out_axes = equation.split(",")[1].split("->")
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=axes)
        kept = {axis: size for axis, size in zip(axes, shape, strict=True) if axis in out_axes}
        zeros = jnp.zeros(list(kept.values()))
        self.bias = nnx.Param(zeros, axes="".join(kept)) if bias else None

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        y: Any = kernels.linear_map(self.equation, x, self.kernel[...])
        y = checkpoint_name(y, LINEAR_OUTPUT)
        return y if self.bias is None else add_bias(y, self.bias[...])

    @scoped
    def parts(self, x: jax.Array) -> list[jax.Array]:
        """Return the C parts of a fused map, such as query, key and value."""
        bias = None if self.bias is None else self.bias[...]
        return kernels.linear_parts(self.equation, x, self.kernel[...], bias)


class Embedding(nnx.Module):
    """A table with a row of width D for each token or position."""

    equation = ""  # the einsum of the output layer, if it shares this table

    def __init__(self, axes: str, *shape: int, rngs: nnx.Rngs):
        # named `kernel`, because weight decay and casts choose parameters by this name
        self.kernel = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape), axes=axes)

    def __call__(self, ids_BT: jax.Array, dtype: str) -> jax.Array:
        """Return the rows of the ids, [B, T, D], split over devices as the table is."""
        rows_BTD = kernels.embed(self.kernel[...], ids_BT)
        return constrain(rows_BTD, "data", None, "fsdp").astype(dtype)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis. Statistics are at least float32."""

    def __init__(
        self, kind: str, width: int, axes: str = "D", *, gain: bool = True, bias: bool = False
    ):
        self.centered = kind == "layernorm"
        self.scale = nnx.Param(jnp.ones(width), axes=axes) if gain else None
        has_bias = bias and gain and self.centered
        self.bias = nnx.Param(jnp.zeros(width), axes=axes) if has_bias else None

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jnp.ones(x.shape[-1]) if self.scale is None else self.scale[...]
        y: Any = kernels.normalize(x, scale, centered=self.centered)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention (Vaswani et al. 2017) with a fused map for query, key and value.

    The fused kernel [D, 3, N, H] holds the maps of all heads; with `n_kv_head`, only key and value
    are fused. The output kernel [N, H, D] sums over the heads, which equals concatenating the heads
    and applying one linear map.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = c.n_embd, c.n_head, c.kv_heads, c.head_dim
        linear = partial(Linear, bias=c.bias, rngs=rngs)
        if K == N:
            self.qkv = linear("BTD,DCNH->BTCNH", D, 3, N, H)
        else:
            self.q = linear("BTD,DNH->BTNH", D, N, H)
            self.kv = linear("BTD,DCKH->BTCKH", D, 2, K, H)
        self.out = linear("BTNH,NHD->BTD", N, H, D, std=residual_std(c))
        if c.qk_norm:
            self.q_norm = Norm("rmsnorm", H, "H")
            self.k_norm = Norm("rmsnorm", H, "H")
        if c.value_residual:
            self.value_mix = nnx.Param(jnp.array(0.5), axes="")
        self.config: Any = c

    @scoped
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Return the branch's output [B, T, D], and the context with updated cache and values."""
        c, ctx = self.config, context
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
        if c.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if c.position == "rope":
            positions_BT = token_positions(x_BTD.shape[1], ctx.position)
            q_BTNH, k_BTKH = apply_rope(q_BTNH, positions_BT), apply_rope(k_BTKH, positions_BT)
        if c.value_residual:
            v_BTKH, ctx = self.mix_first_values(v_BTKH, ctx)
        ctx = replace(ctx, cache=update_cache(ctx.cache, k_BTKH, v_BTKH, ctx.position))
        scale = c.head_dim**-0.5
        if ctx.cache is not None and ctx.position is not None:
            options = AttentionOptions(c.causal, c.sliding_window, scale)
            o_BTNH = decode_attention(q_BTNH, ctx.cache, ctx.position, options)
        else:
            dropout = None
            if c.attention_dropout:
                dropout = ctx.dropout.bind(ctx.layer, DropoutSite.ATTENTION_WEIGHTS)
            o_BTNH = kernels.dot_product_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                causal=c.causal,
                window=c.sliding_window,
                scale=scale,
                segment_ids_BT=ctx.segment_ids_BT,
                dropout=dropout,
                backend=c.attention,
            )
        o_BTD = self.out(o_BTNH)
        return ctx.dropout(o_BTD, ctx.layer, DropoutSite.ATTENTION_OUTPUT), ctx

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map x to query [B, T, N, H], key and value [B, T, K, H]."""
        if self.config.kv_heads == self.config.n_head:
            q_BTNH, k_BTKH, v_BTKH = self.qkv.parts(x_BTD)
        else:
            k_BTKH, v_BTKH = self.kv.parts(x_BTD)
            q_BTNH = self.q(x_BTD)
        return q_BTNH, k_BTKH, v_BTKH

    def mix_first_values(self, v_BTKH: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """Mix in the first layer's values (Zhou et al. 2024, "Value Residual Learning")."""
        first_BTKH = context.first_v_BTKH
        if first_BTKH is None:
            first_BTKH = v_BTKH
        else:  # a scan starts with zeros, and its layer is a traced number
            first_BTKH = jnp.where(context.layer == 0, v_BTKH, first_BTKH)
        mix = self.value_mix[...]  # float32, so that its gradient is summed in float32
        mixed_BTKH = (1 - mix) * v_BTKH + mix * first_BTKH
        return mixed_BTKH.astype(v_BTKH.dtype), replace(context, first_v_BTKH=first_BTKH)


class MLP(nnx.Module):
    """Two linear maps with a non-linearity, or a gate (SwiGLU; Shazeer 2020), between them."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        linear = partial(Linear, bias=c.bias, rngs=rngs)
        D, F = c.n_embd, c.mlp_hidden_dim
        self.kind = c.mlp
        if c.mlp == "swiglu":
            self.up = linear("BTD,DCF->BTCF", D, 2, F)
        else:
            self.up = linear("BTD,DF->BTF", D, F)
        self.down = linear("BTF,FD->BTD", F, D, std=residual_std(c))

    @scoped
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        h = self.up(x_BTD)
        if self.kind == "swiglu":
            gate_BTF, up_BTF = jnp.unstack(h, axis=2)
            h_BTF = jax.nn.silu(gate_BTF) * up_BTF
        else:
            h_BTF = ACTIVATIONS[self.kind](h)
        return context.dropout(self.down(h_BTF), context.layer, DropoutSite.MLP_OUTPUT)


class Block(nnx.Module):
    """Attention and MLP, each with a norm before it, added to the residual stream."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.ln_1 = Norm(c.norm, c.n_embd, gain=c.norm_gain, bias=c.bias)
        self.attn = Attention(c, rngs=rngs)
        self.ln_2 = Norm(c.norm, c.n_embd, gain=c.norm_gain, bias=c.bias)
        self.mlp = MLP(c, rngs=rngs)

    @scoped
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        # returns x too, so that one GPU kernel adds the gradients of the residual and of the norm
        x_BTD, h_BTD = kernels.residual_and_norm(x_BTD, self.ln_1)
        attn_BTD, context = self.attn(h_BTD, context)
        x_BTD = x_BTD + attn_BTD
        x_BTD, h_BTD = kernels.residual_and_norm(x_BTD, self.ln_2)
        x_BTD = x_BTD + self.mlp(h_BTD, context)
        return constrain_batch(x_BTD), context


class PostNormBlock(Block):
    """The block of Vaswani et al. (2017), with a norm after each addition."""

    @scoped
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        attn_BTD, context = self.attn(x_BTD, context)
        x_BTD = self.ln_1(x_BTD + attn_BTD)
        x_BTD = self.ln_2(x_BTD + self.mlp(x_BTD, context))
        return constrain_batch(x_BTD), context


class GPT(nnx.Module):
    """A decoder-only transformer: int32 ids [B, T] -> logits [B, T, V] in `config.dtype`.

    `vocab_size`, `dtype` and `attention` of `config` must have their final values. With
    `scan_layers` the parameters of all blocks are stacked on a leading axis L.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        V, D = c.padded_vocab_size, c.n_embd
        self.embed = Embedding("VD", V, D, rngs=rngs)
        if c.position == "learned":
            self.pos_embed = Embedding("TD", c.block_size, D, rngs=rngs)
        block_class = Block if c.norm_position == "pre" else PostNormBlock
        new_block = lambda key: block_class(c, rngs=nnx.Rngs(params=key))
        keys = jax.random.split(rngs.params(), c.n_layer)
        if c.scan_layers:
            self.blocks: Any = stacked_block(new_block, keys)
        else:
            self.blocks = nnx.List(map(new_block, keys))
        if c.norm_position == "pre":
            self.ln_f = Norm(c.norm, D, gain=c.norm_gain, bias=c.bias)
        if c.tie_embeddings:
            self.embed.equation = OUTPUT_EQUATION
        else:
            self.lm_head = Linear(OUTPUT_EQUATION, V, D, bias=False, rngs=rngs)

    def __call__(
        self,
        tokens_BT: jax.Array,
        dropout: Dropout = Dropout(),
        cache: list[KVCache] | None = None,
        position: DecodePosition | None = None,
        logits_at_B: jax.Array | None = None,
    ) -> Any:
        """Return logits [B, T, V]; with a `cache`, return (logits, updated cache).

        With a `cache` alone (prefill), the tokens start their sequences, and fill the cache's past.
        With a `position` too (decode), they are one new token per sequence, T = 1, which is added
        to the cache's chunk. With `logits_at_B`, logits are of this one position per sequence,
        [B, 1, V].
        """
        c = self.config
        segment_ids_BT = None
        if c.document_mask and cache is None:
            segment_ids_BT = jnp.cumsum(tokens_BT == c.eot_id, axis=1)
        context = Context(dropout, segment_ids_BT=segment_ids_BT, position=position)
        x_BTD = self.embed_tokens(tokens_BT, position)
        x_BTD = dropout(x_BTD, c.n_layer, DropoutSite.EMBEDDING)
        new_cache = []
        if c.scan_layers:  # never with a cache, because the sampler unstacks the layers
            x_BTD = self.scan_blocks(x_BTD, context)
        else:
            for layer, block in enumerate(self.blocks):
                layer_cache = None if cache is None else cache[layer]
                context = replace(context, layer=layer, cache=layer_cache)
                x_BTD, context = with_remat(c, block)(x_BTD, context)
                new_cache.append(context.cache)
        if logits_at_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, logits_at_B[:, None, None], axis=1)
        if c.norm_position == "pre":
            _, x_BTD = kernels.residual_and_norm(x_BTD, self.ln_f)
        logits_BTV = self.logits(x_BTD)
        return logits_BTV if cache is None else (logits_BTV, new_cache)

    @jax.named_scope("embed")
    def embed_tokens(self, tokens_BT: jax.Array, position: DecodePosition | None) -> jax.Array:
        """Return the sum of token and position embeddings, [B, T, D]."""
        c, T = self.config, tokens_BT.shape[1]
        # the lookup splits D as the table is split; from here on only the batch is split
        x_BTD = constrain_batch(self.embed(tokens_BT, c.dtype))
        if c.position == "learned":
            table_TD = self.pos_embed.kernel[...].astype(c.dtype)
            if position is None:
                x_BTD = kernels.add_positions(x_BTD, table_TD[:T])
            else:
                x_BTD += table_TD[token_positions(T, position)]
        if c.position == "sinusoidal":
            table_BTD = sinusoids(token_positions(T, position), c.n_embd)
            x_BTD = x_BTD * math.sqrt(c.n_embd) + table_BTD.astype(c.dtype)
        return constrain_batch(x_BTD)

    @jax.named_scope("lm_head")
    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits [B, T, V]; the logits of padded ids are -inf."""
        c = self.config
        head = self.embed if c.tie_embeddings else self.lm_head
        logits_BTV = kernels.linear_map(OUTPUT_EQUATION, x_BTD, head.kernel[...])
        return cap_and_mask(logits_BTV, c)

    def scan_blocks(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Apply all blocks in a loop over the stacked layers, so that one block is compiled."""
        c = self.config
        graphdef, stacked = nnx.split(self.blocks)
        first_v = None
        if c.value_residual:
            first_v = jnp.zeros((*x_BTD.shape[:2], c.kv_heads, c.head_dim), x_BTD.dtype)

        def step(carry: tuple, layer_params: tuple) -> tuple[tuple, None]:
            (x_BTD, first_v), (layer, params) = carry, layer_params
            block = with_remat(c, nnx.merge(graphdef, params))
            x_BTD, new = block(x_BTD, replace(context, layer=layer, first_v_BTKH=first_v))
            return (x_BTD, new.first_v_BTKH), None

        layers = jnp.arange(c.n_layer), stacked
        (x_BTD, _), _ = jax.lax.scan(step, (x_BTD, first_v), layers)
        return x_BTD

    def init_cache(self, batch: int, chunk: int) -> list[KVCache]:
        """Return an empty cache per layer, for sequences decoded in chunks of `chunk` tokens.

        Its past has room for `block_size` positions and one more chunk.
        """
        c = self.config
        rows, past = batch * c.kv_heads, c.block_size + chunk
        return [empty_cache(rows, past, chunk, c.head_dim, c.dtype) for _ in range(c.n_layer)]


def cap_and_mask(logits_BTV: jax.Array, c: ModelConfig) -> jax.Array:
    """Apply the soft cap (Gemma team 2024), and set the logits of padded ids to -inf."""
    if c.logit_softcap:
        logits_BTV = c.logit_softcap * jnp.tanh(logits_BTV / c.logit_softcap)
    if c.padded_vocab_size == c.vocab_size:
        return logits_BTV
    # added, and not selected by `where`: cuBLAS adds a vector as it writes a matmul
    is_token_V = jnp.arange(c.padded_vocab_size) < c.vocab_size
    return logits_BTV + jnp.where(is_token_V, 0, -jnp.inf).astype(logits_BTV.dtype)


def residual_std(c: ModelConfig) -> float:
    """Return the initial std of a branch's last linear layer: GPT-2's, or 0 as in Fixup (2019)."""
    return 0.0 if c.zero_init_projections else INIT_STD / math.sqrt(2 * c.n_layer)


def token_positions(length: int, position: DecodePosition | None) -> jax.Array:
    """Return positions [1 or B, T]: 0 to T - 1, or where the decoded tokens are."""
    start_B = jnp.zeros(1, jnp.int32) if position is None else position.start_B + position.step
    return start_B[:, None] + jnp.arange(length)


def with_remat(c: Config, block: Block) -> Callable:
    """Return the block, whose backward pass recomputes what `remat` says."""
    if c.remat == "none":
        return block
    # without a scan, XLA must be kept from merging the recomputation with the forward pass
    return jax.checkpoint(block, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)


def stacked_block(make: Callable[[jax.Array], Block], keys: jax.Array) -> Block:
    """Return a Block whose parameters are those of one block per key, stacked on an axis L."""
    graphdef, _ = nnx.split(nnx.eval_shape(make, jax.random.key(0)))
    init = lambda key: nnx.to_pure_dict(nnx.split(make(key))[1])
    return nnx.merge(graphdef, jax.vmap(init)(keys))


# ---- a model as a function of its parameters -------------------------------------------------
# nnx.split(model) gives (graphdef, state): the tree of modules without arrays, and the arrays.
# nnx.merge(graphdef, params) makes the model again. param[...] is a parameter's array.


class AbstractModel(NamedTuple):
    """The structure of a model, without its arrays."""

    graphdef: nnx.GraphDef
    shapes: dict  # of the parameters: a tree of jax.ShapeDtypeStruct
    axes: dict  # the axis letters of each parameter, or spaces if it has none


@cache
def abstract_model(config: Config) -> AbstractModel:
    """Return the structure of a config's model: a GPT, unless its class makes another model."""
    with jax.sharding.use_abstract_mesh(NO_MESH):  # the cached shapes name no mesh
        model = nnx.eval_shape(lambda: config.make_model(nnx.Rngs(0)))
    name_scopes(model)
    graphdef, state = nnx.split(model)

    def letters(param: Any) -> str:
        axes = getattr(param, "axes", None)
        if axes is None:
            return " " * len(param.shape)
        return axes.rjust(len(param.shape), "L")  # stacked layers have one more axis

    axes = jax.tree.map(letters, state, is_leaf=lambda p: isinstance(p, nnx.Param))
    return AbstractModel(graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def init_params(config: Config, key: jax.Array) -> dict:
    """Return fresh parameters: nested dicts of float32 arrays."""
    return nnx.to_pure_dict(nnx.split(config.make_model(nnx.Rngs(params=key)))[1])


def unstack_layers(params: dict) -> dict:
    """Convert parameters of a model with `scan_layers` to those of a model without it."""
    layers = len(jax.tree.leaves(params["blocks"])[0])
    blocks = {i: jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(layers)}
    return params | {"blocks": blocks}
