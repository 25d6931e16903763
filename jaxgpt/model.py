"""The GPT: embedding, blocks, final norm, output map.

B batch, T length, S cached length, D embedding, N heads, K KV heads, H head width, F MLP hidden,
V vocabulary (padded), L layers, C the parts of a fused map (query, key, value; gate, up).
A parameter carries its letters as `axes`: `sharding.py` maps letters to the mesh.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.attention import attend, rotate
from jaxgpt.config import Config, Model

INIT_STD = 0.02  # of every matrix and embedding; Radford et al. 2019
NORM_EPSILON = 1e-5

EMBEDDING, WEIGHTS, ATTENTION, MLP = range(4)  # where dropout acts


class Cache(NamedTuple):
    """Keys and values of one layer, for the positions seen so far."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["keys_B"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropout:
    """Zeroes a share `rate` of its input and scales up the rest (Srivastava et al. 2014).

    Every sequence has a key of its own, so its mask does not depend on how a step's sequences
    are split into micro-batches or over devices. The share is rounded to 1/65536.
    """

    rate: float = 0.0
    keys_B: jax.Array | None = None

    def layer(self, layer: int | jax.Array) -> "Dropout":
        return Dropout(self.rate, _fold(self.keys_B, layer)) if self.rate else self

    def __call__(self, x: jax.Array, site: int) -> jax.Array:
        if not self.rate:
            return x
        bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))
        dropped = round(self.rate * 2**16)
        keep = bits(_fold(self.keys_B, site)) >= dropped
        return jnp.where(keep, x / (1 - dropped / 2**16), 0)


def _fold(keys_B: jax.Array | None, number: int | jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


class Linear(nnx.Module):
    """An affine map written as an einsum: `BTD,DNH->BTNH` maps the embedding to heads."""

    def __init__(
        self, equation: str, *shape: int, bias: bool, rngs: nnx.Rngs, std: float = INIT_STD
    ):
        self.equation = equation
        axes, out_axes = equation.split(",")[1].split("->")
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=axes)
        kept = [(n, a) for n, a in zip(shape, axes, strict=True) if a in out_axes]
        bias_shape, bias_axes = [n for n, _ in kept], "".join(a for _, a in kept)
        self.bias = nnx.Param(jnp.zeros(bias_shape), axes=bias_axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum(self.equation, x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Table(nnx.Module):
    """One row of width D for each token or position."""

    def __init__(self, axes: str, *shape: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape), axes=axes)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) of the last axis.

    Statistics are float32 at least, whatever the type of the input.
    """

    def __init__(self, c: Model, width: int, axes: str = "D", *, kind: str = ""):
        self.kind = kind or c.norm
        has_bias = c.bias and self.kind == "layernorm"
        self.scale = nnx.Param(jnp.ones(width), axes=axes)
        self.bias = nnx.Param(jnp.zeros(width), axes=axes) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layernorm":
            wide -= wide.mean(-1, keepdims=True)
        variance = jnp.square(wide).mean(-1, keepdims=True)
        y = wide * jax.lax.rsqrt(variance + NORM_EPSILON) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with one fused map for query, key and value.

    The fused kernel [D, 3, N, H] holds the maps of N separate heads side by side, and the output
    kernel [N, H, D] sums over heads what separate heads would concatenate and then map.
    """

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        D, N, K, H = c.n_embd, c.n_head, c.kv_heads, c.head_width
        linear = partial(Linear, bias=c.bias, rngs=rngs)
        if K == N:
            self.qkv = linear("BTD,DCNH->BTCNH", D, 3, N, H)
        else:
            self.q = linear("BTD,DNH->BTNH", D, N, H)
            self.kv = linear("BTD,DCKH->BTCKH", D, 2, K, H)
        self.out = linear("BTNH,NHD->BTD", N, H, D, std=_residual_std(c))
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
        start_B: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None, Cache | None]:
        """-> the branch [B, T, D], the first layer's values, and the cache with these T in it."""
        c = self.config
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
        if c.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if c.position == "rope":
            positions_BT = _positions(x_BTD.shape[1], start_B)
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT), rotate(k_BTKH, positions_BT)
        if c.value_residual:  # Zhou et al. 2024, "Value Residual Learning"
            v_first = v_BTKH if v_first is None else jnp.where(layer == 0, v_BTKH, v_first)
            mix = self.value_mix[...].astype(v_BTKH.dtype)
            v_BTKH = (1 - mix) * v_BTKH + mix * v_first
        if cache is not None:
            cache = _write(cache, k_BTKH, v_BTKH, start_B)
        keys, values, mask_BTS = k_BTKH, v_BTKH, None
        if cache is not None and start_B is not None:
            keys, values = cache
            mask_BTS = _cached(keys.shape[1], start_B, c.attention_window)
        o_BTNH = attend(
            q_BTNH,
            keys,
            values,
            causal=c.causal,
            window=c.attention_window,
            mask_BTS=mask_BTS,
            dropout=partial(drop, site=WEIGHTS) if drop.rate else None,
            backend=c.attention,
        )
        return drop(self.out(o_BTNH), ATTENTION), v_first, cache

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x -> q [B, T, N, H], k and v [B, T, K, H]."""
        if self.config.kv_heads == self.config.n_head:
            q, k, v = jnp.split(self.qkv(x_BTD), 3, axis=2)  # one concatenation in the gradient
            return q.squeeze(2), k.squeeze(2), v.squeeze(2)
        k, v = jnp.split(self.kv(x_BTD), 2, axis=2)
        return self.q(x_BTD), k.squeeze(2), v.squeeze(2)


def _positions(length: int, start_B: jax.Array | None) -> jax.Array:
    """Positions of a sequence's next tokens, [1 or B, T]: from 0, or from what is cached."""
    start = jnp.zeros(1, jnp.int32) if start_B is None else start_B
    return start[:, None] + jnp.arange(length)


def _write(cache: Cache, k_BTKH, v_BTKH, start_B: jax.Array | None) -> Cache:
    if start_B is None:
        start_B = jnp.zeros(k_BTKH.shape[0], jnp.int32)
    put = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    k_BTKH, v_BTKH = k_BTKH.astype(cache.k_BSKH.dtype), v_BTKH.astype(cache.v_BSKH.dtype)
    return Cache(put(cache.k_BSKH, k_BTKH, start_B), put(cache.v_BSKH, v_BTKH, start_B))


def _cached(length: int, start_B: jax.Array, window: int) -> jax.Array:
    """Which cached keys the query at position `start` may look at, [B, 1, S]."""
    key, query = jnp.arange(length), start_B[:, None, None]
    return (key <= query) & (key > query - window) if window else key <= query


ACTIVATIONS = {
    # through erf and not erfc, which XLA:CPU does not vectorise
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
}


class Mlp(nnx.Module):
    """Up, non-linearity, down; swiglu gates instead (Shazeer 2020)."""

    def __init__(self, c: Model, *, rngs: nnx.Rngs):
        linear, D, F = partial(Linear, bias=c.bias, rngs=rngs), c.n_embd, c.inner_width
        self.kind = c.mlp
        if c.mlp == "swiglu":
            self.up = linear("BTD,DCF->BTCF", D, 2, F)
        else:
            self.up = linear("BTD,DF->BTF", D, F)
        self.down = linear("BTF,FD->BTD", F, D, std=_residual_std(c))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up = self.up(x_BTD)
        if self.kind == "swiglu":
            gate_BTCF, up_BTCF = jnp.split(up, 2, axis=2)
            return self.down((jax.nn.silu(gate_BTCF) * up_BTCF).squeeze(2))
        return self.down(ACTIVATIONS[self.kind](up))


def _residual_std(c: Model) -> float:
    """Scaled so that the sum of all 2L branches starts with the deviation of one; GPT-2's."""
    return INIT_STD / math.sqrt(2 * c.n_layer)


class Block(nnx.Module):
    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.ln_1 = Norm(c, c.n_embd)
        self.attn = Attention(c, rngs=rngs)
        self.ln_2 = Norm(c, c.n_embd)
        self.mlp = Mlp(c, rngs=rngs)
        self.norm_position = c.norm_position

    def __call__(self, x_BTD, v_first=None, layer=0, drop=Dropout(), cache=None, start_B=None):
        """-> x [B, T, D], the first layer's values, the cache."""
        drop = drop.layer(layer)
        attn = partial(
            self.attn, v_first=v_first, layer=layer, drop=drop, cache=cache, start_B=start_B
        )
        if self.norm_position == "pre":
            h_BTD, v_first, cache = attn(self.ln_1(x_BTD))
            x_BTD = x_BTD + h_BTD
            x_BTD = x_BTD + drop(self.mlp(self.ln_2(x_BTD)), MLP)
        else:
            h_BTD, v_first, cache = attn(x_BTD)
            x_BTD = self.ln_1(x_BTD + h_BTD)
            x_BTD = self.ln_2(x_BTD + drop(self.mlp(x_BTD), MLP))
        return x_BTD, v_first, cache


REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class GPT(nnx.Module):
    """A decoder-only transformer: token ids [B, T] -> logits [B, T, V].

    `config` is resolved: `vocab_size`, `dtype` and `attention` say what they are. With
    `scan_layers` the blocks' parameters carry a leading axis L.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        V, D = c.padded_vocab, c.n_embd
        self.embed = Table("VD", V, D, rngs=rngs)
        if c.position == "learned":
            self.pos_embed = Table("TD", c.block_size, D, rngs=rngs)
        keys = jax.random.split(rngs.params(), c.n_layer)
        if c.scan_layers:
            self.blocks = _stack(c, keys)
        else:
            self.blocks = nnx.List([Block(c, rngs=nnx.Rngs(params=key)) for key in keys])
        if c.norm_position == "pre":
            self.ln_f = Norm(c, D)
        if not c.tie_embeddings:
            self.lm_head = Table("VD", V, D, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.logits(self.features(tokens_BT)[0])

    def features(
        self,
        tokens_BT: jax.Array,
        drop: Dropout = Dropout(),
        caches: list[Cache] | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Cache] | None]:
        """What the output map sees, [B, T, D], and the caches with these tokens in them.

        With `caches` alone the tokens are the first of their sequences; with `start_B` too,
        they are one token each, at position `start_B`, after that many cached ones.
        """
        x_BTD = drop.layer(self.config.n_layer)(self._embed(tokens_BT, start_B), EMBEDDING)
        if self.config.scan_layers:
            x_BTD = self._scan_blocks(x_BTD, drop)
        else:
            v_first = None
            for i, block in enumerate(self.blocks):
                cache = caches[i] if caches else None
                x_BTD, v_first, cache = self._remat(block)(
                    x_BTD, v_first, i, drop, cache, start_B
                )
                if caches:
                    caches = caches[:i] + [cache] + caches[i + 1 :]
        return self.ln_f(x_BTD) if self.config.norm_position == "pre" else x_BTD, caches

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V]; those of padded ids are -inf."""
        head_VD = (self.embed if self.config.tie_embeddings else self.lm_head).kernel[...]
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD.astype(x_BTD.dtype))
        if cap := self.config.logit_softcap:  # Gemma team 2024
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return jnp.where(jnp.arange(len(head_VD)) < self.config.vocab_size, logits_BTV, -jnp.inf)

    def _embed(self, tokens_BT: jax.Array, start_B: jax.Array | None) -> jax.Array:
        c, length = self.config, tokens_BT.shape[1]
        x_BTD = self.embed.kernel[...][tokens_BT].astype(c.dtype)
        if c.position == "learned":
            table_TD = self.pos_embed.kernel[...].astype(c.dtype)
            x_BTD += table_TD[:length] if start_B is None else table_TD[_positions(length, start_B)]
        if c.position == "sinusoidal":
            table_BTD = sinusoids(_positions(length, start_B), c.n_embd)
            x_BTD = x_BTD * math.sqrt(c.n_embd) + table_BTD.astype(c.dtype)
        return x_BTD

    def _scan_blocks(self, x_BTD: jax.Array, drop: Dropout) -> jax.Array:
        c = self.config
        graphdef, stacked = nnx.split(self.blocks)
        B, T, _ = x_BTD.shape
        v_first = jnp.zeros((B, T, c.kv_heads, c.head_width), x_BTD.dtype)

        def step(carry, layer_params):
            layer, params = layer_params
            block = self._remat(nnx.merge(graphdef, params))
            return block(*carry, layer, drop)[:2], None

        (x_BTD, _), _ = jax.lax.scan(step, (x_BTD, v_first), (jnp.arange(c.n_layer), stacked))
        return x_BTD

    def _remat(self, block: Block):
        if self.config.remat == "none":
            return block
        cse = not self.config.scan_layers  # a scan's body cannot be merged with its recomputation
        return jax.checkpoint(block, policy=REMAT[self.config.remat], prevent_cse=cse)


def _stack(c: Config, keys: jax.Array) -> Block:
    """A Block whose parameters are those of one block a key, stacked on a leading axis L."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(c, rngs=nnx.Rngs(0))))
    init = lambda key: nnx.to_pure_dict(nnx.split(Block(c, rngs=nnx.Rngs(params=key)))[1])
    return nnx.merge(graphdef, jax.vmap(init)(keys))


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Sines on even and cosines on odd columns, [B, T, D]; Vaswani et al. 2017, section 3.5."""
    frequency = 10_000.0 ** (-(jnp.arange(width) // 2 * 2) / width)
    angle_BTD = positions_BT[..., None] * frequency
    return jnp.where(jnp.arange(width) % 2 == 0, jnp.sin(angle_BTD), jnp.cos(angle_BTD))


# ---- the model as a function of its parameters -----------------------------------------------


def split(config: Config) -> tuple[nnx.GraphDef, dict, dict]:
    """The model's structure, and two trees like its parameters: shapes, and axis letters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))
    axes = jax.tree.map(
        lambda p: p.axes.rjust(len(p.shape), "L"), state, is_leaf=lambda p: isinstance(p, nnx.Param)
    )
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def init(config: Config, key: jax.Array) -> dict:
    """Fresh parameters: nested dicts of float32 arrays."""
    return nnx.to_pure_dict(nnx.split(GPT(config, rngs=nnx.Rngs(params=key)))[1])


def unstack(params: dict) -> dict:
    """Parameters of a model with `scan_layers`, as those of one without it."""
    layers = len(jax.tree.leaves(params["blocks"])[0])
    blocks = {i: jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(layers)}
    return params | {"blocks": blocks}


def init_caches(config: Config, batch: int) -> list[Cache]:
    """Empty caches, one a layer, for `block_size` positions of `batch` sequences."""
    shape = (batch, config.block_size, config.kv_heads, config.head_width)
    empty = jnp.zeros(shape, config.dtype)
    return [Cache(empty, empty) for _ in range(config.n_layer)]


def count_params(config: Config) -> int:
    """Parameters as nanoGPT counts them: without position embeddings, and without padding."""
    _, shapes, _ = split(config.replace(scan_layers=False))
    total = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes))
    padding = (config.padded_vocab - config.vocab_size) * config.n_embd
    positions = math.prod(shapes["pos_embed"]["kernel"].shape) if "pos_embed" in shapes else 0
    return total - positions - padding * (1 if config.tie_embeddings else 2)


def flops_per_token(config: Config) -> int:
    """Of a training step, forward and backward: 6 N + 12 L H Q T, PaLM's and nanoGPT's formula."""
    c = config
    return 6 * count_params(c) + 12 * c.n_layer * c.n_embd * c.block_size
