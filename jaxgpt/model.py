"""The GPT: embedding, blocks, final norm, output map.

B batch, T length, S cached length, D embedding, N heads, K KV heads, H head width, F MLP hidden,
V vocabulary (padded), L layers, C the parts of a fused map (query, key, value; gate, up).
A parameter carries its letters as `axes`: `sharding.py` maps letters to the mesh.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.attention import Attention, Cache, KeysValues, Place, positions
from jaxgpt.config import Config, ModelConfig
from jaxgpt.layers import (
    EMBEDDING,
    INIT_STD,
    LINEAR,
    MLP,
    Dropout,
    Linear,
    Norm,
    Table,
    add_positions,
    contract,
    in_type,
    look_up,
    pack,
    residual_std,
    split_batch,
    torch_uniform,
)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    """On a GPU its gradient computes again, in one kernel, what XLA would hold in memory."""
    gelu = partial(jax.nn.gelu, approximate=True)
    return jax.lax.platform_dependent(x, cuda=jax.checkpoint(gelu), default=gelu)


ACTIVATIONS = {
    # through erf and not erfc, which XLA:CPU does not vectorise
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, "Primer"
}
OUTPUT_MAP = "BTD,VD->BTV"


class Mlp(nnx.Module):
    """Up, non-linearity, down; swiglu gates instead (Shazeer 2020)."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        linear, D, F = (
            partial(Linear, bias=c.bias, init=c.init, rngs=rngs),
            c.n_embd,
            c.mlp_hidden_dim,
        )
        self.kind = c.mlp
        if c.mlp == "swiglu":
            self.up = linear("BTD,DCF->BTCF", D, 2, F)
        else:
            self.up = linear("BTD,DF->BTF", D, F)
        self.down = linear("BTF,FD->BTD", F, D, std=residual_std(c))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up = self.up(x_BTD)
        if self.kind == "swiglu":
            gate_BTCF, up_BTCF = jnp.split(up, 2, axis=2)
            return self.down((jax.nn.silu(gate_BTCF) * up_BTCF).squeeze(2))
        return self.down(ACTIVATIONS[self.kind](up))


class Block(nnx.Module):
    """Attention, then the MLP: each a branch that is added to what entered it."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.ln_1 = Norm(c, c.n_embd)
        self.attn = Attention(c, rngs=rngs)
        self.mlp = Mlp(c, rngs=rngs) if c.mlp != "none" else None
        self.ln_2 = Norm(c, c.n_embd) if c.mlp != "none" else None
        self.is_pre, self.residual = c.norm_position == "pre", c.residual

    def __call__(
        self,
        x_BTD,
        v_first=None,
        layer=0,
        drop=Dropout(),
        cache=None,
        place=None,
        documents_BT=None,
    ):
        """-> x [B, T, D], the first layer's values, the cache."""
        drop = drop.layer(layer)
        h_BTD = self.ln_1(x_BTD) if self.is_pre else x_BTD
        where = {"cache": cache, "place": place, "documents_BT": documents_BT}
        h_BTD, v_first, cache = self.attn(h_BTD, v_first, layer, drop, **where)
        x_BTD = self._join(x_BTD, h_BTD, self.ln_1)
        if self.mlp and self.ln_2:
            h_BTD = self.mlp(self.ln_2(x_BTD) if self.is_pre else x_BTD)
            x_BTD = self._join(x_BTD, drop(h_BTD, MLP), self.ln_2)
        return split_batch(x_BTD), v_first, cache

    def _join(self, x_BTD: jax.Array, h_BTD: jax.Array, norm: Norm) -> jax.Array:
        """The stream `x` after a branch gave `h`."""
        x_BTD = x_BTD + h_BTD if self.residual else h_BTD
        return x_BTD if self.is_pre else norm(x_BTD)


REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class GPT(nnx.Module):
    """A decoder-only transformer: token ids [B, T] -> logits [B, T, V].

    `config` is resolved: `vocab_size`, `dtype` and `attention` say what they are. With
    `scan_layers` the blocks' parameters carry a leading axis L.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        V, D = c.padded_vocab_size, c.n_embd
        std = 1.0 if c.init == "torch" else INIT_STD
        self.embed = Table("VD", V, D, rngs=rngs, std=std)
        if c.position == "learned":
            self.pos_embed = Table("TD", c.block_size, D, rngs=rngs, std=std)
        keys = jax.random.split(rngs.params(), c.n_layer)
        make = lambda key: Block(c, rngs=nnx.Rngs(params=key))
        self.blocks: Any = _stack(make, keys) if c.scan_layers else nnx.List(map(make, keys))
        if c.norm_position == "pre":
            self.ln_f = Norm(c, D)
        if not c.tie_embeddings:
            self.lm_head = Table("VD", V, D, rngs=rngs, fan_in=D if c.init == "torch" else 0)
        if c.head_bias:
            bias = torch_uniform(D, rngs, (V,)) if c.init == "torch" else jnp.zeros(V)
            self.head_bias = nnx.Param(bias, axes="V")

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.logits(self.features(tokens_BT)[0])

    def features(
        self,
        tokens_BT: jax.Array,
        drop: Dropout = Dropout(),
        caches: list[Cache] | None = None,
        place: Place | None = None,
    ) -> tuple[jax.Array, list[Cache] | None]:
        """What the output map sees, [B, T, D], and the caches with these tokens in them.

        With `caches` alone the tokens are the first of their sequences, and the past is what they
        leave; with `place` too they are one token each, of the chunk. Of several documents, which
        `document_mask` keeps apart, there are none in a cache.
        """
        documents_BT = None
        if self.config.document_mask and caches is None:
            documents_BT = jnp.cumsum(tokens_BT == self.config.eot_id, axis=1)
        x_BTD = split_batch(self._embed(tokens_BT, place))
        if self.config.embed_dropout:
            x_BTD = drop.layer(self.config.n_layer)(x_BTD, EMBEDDING)
        if self.config.scan_layers:
            x_BTD = self._scan_blocks(x_BTD, drop, documents_BT)
        else:
            v_first, old, new = None, caches or [None] * self.config.n_layer, []
            for i, block in enumerate(self.blocks):
                call = self._remat(block)
                x_BTD, v_first, cache = call(x_BTD, v_first, i, drop, old[i], place, documents_BT)
                new.append(cache)
            caches = new if caches is not None else None
        return self.ln_f(x_BTD) if self.config.norm_position == "pre" else x_BTD, caches

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V]; those of padded ids are -inf."""
        head_VD = (self.embed if self.config.tie_embeddings else self.lm_head).kernel[...]
        logits_BTV: Any = contract(OUTPUT_MAP, x_BTD, in_type(head_VD, x_BTD.dtype))
        if self.config.head_bias:
            logits_BTV += self.head_bias[...].astype(x_BTD.dtype)
        if cap := self.config.logit_softcap:  # Gemma team 2024
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        is_token_V = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(is_token_V, logits_BTV, -jnp.inf)

    def init_cache(self, batch: int, chunk: int) -> list[Cache]:
        """Empty caches; see `init_caches`."""
        return init_caches(self.config, batch, chunk)

    def _embed(self, tokens_BT: jax.Array, place: Place | None) -> jax.Array:
        c, length = self.config, tokens_BT.shape[1]
        x_BTD = split_batch(look_up(self.embed.kernel[...], tokens_BT).astype(c.dtype))
        if c.position == "learned":
            table_TD = self.pos_embed.kernel[...].astype(c.dtype)
            if place is None:
                x_BTD = add_positions(x_BTD, table_TD[:length])
            else:
                x_BTD += table_TD[positions(length, place)]
        if c.position == "sinusoidal":
            table_BTD = sinusoids(positions(length, place), c.n_embd)
            x_BTD = x_BTD * math.sqrt(c.n_embd) + table_BTD.astype(c.dtype)
        return x_BTD

    def _scan_blocks(self, x_BTD: jax.Array, drop: Dropout, documents_BT) -> jax.Array:
        c = self.config
        graphdef, stacked = nnx.split(self.blocks)
        B, T, _ = x_BTD.shape
        v_first = jnp.zeros((B, T, c.kv_heads, c.head_dim), x_BTD.dtype)

        def step(carry, layer_params):
            layer, params = layer_params
            block = self._remat(nnx.merge(graphdef, params))
            return block(*carry, layer, drop, documents_BT=documents_BT)[:2], None

        (x_BTD, _), _ = jax.lax.scan(step, (x_BTD, v_first), (jnp.arange(c.n_layer), stacked))
        return x_BTD

    def _remat(self, block: Block) -> Callable:
        if self.config.remat == "none":
            return block
        cse = not self.config.scan_layers  # a scan's body cannot be merged with its recomputation
        return jax.checkpoint(block, policy=REMAT[self.config.remat], prevent_cse=cse)


def _stack(make: Callable[[jax.Array], Block], keys: jax.Array) -> Block:
    """A Block whose parameters are those of one block a key, stacked on a leading axis L."""
    graphdef, _ = nnx.split(nnx.eval_shape(make, jax.random.key(0)))
    init = lambda key: nnx.to_pure_dict(nnx.split(make(key))[1])
    return nnx.merge(graphdef, jax.vmap(init)(keys))


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Sines on even and cosines on odd columns, [B, T, D]; Vaswani et al. 2017, section 3.5."""
    frequency = 10_000.0 ** (-(jnp.arange(width) // 2 * 2) / width)
    angle_BTD = positions_BT[..., None] * frequency
    return jnp.where(jnp.arange(width) % 2 == 0, jnp.sin(angle_BTD), jnp.cos(angle_BTD))


# ---- the model as a function of its parameters -----------------------------------------------


def split(config: Config) -> tuple[nnx.GraphDef, dict, dict]:
    """The model's structure, and two trees like its parameters: shapes, and axis letters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.make_model(nnx.Rngs(0))))
    axes = jax.tree.map(
        lambda p: getattr(p, "axes", "").rjust(len(p.shape), "L"),
        state,
        is_leaf=lambda p: isinstance(p, nnx.Param),
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


def stack(params: dict) -> dict:
    """Parameters of a model without `scan_layers`, in NumPy, as those of one with it."""
    blocks = [params["blocks"][i] for i in range(len(params["blocks"]))]
    return params | {"blocks": jax.tree.map(lambda *layers: np.stack(layers), *blocks)}


def pack_kernels(config: Config, params: dict) -> dict:
    """The parameters with large kernels packed, for a CPU to decode one sequence; see `pack`."""
    network = nnx.merge(split(config)[0], params)
    for _, module in nnx.iter_modules(network):
        if isinstance(module, Linear):
            module.kernel.set_value(pack(module.equation, module.kernel[...]))
    head = (network.embed if config.tie_embeddings else network.lm_head).kernel
    head.set_value(pack(OUTPUT_MAP, head[...]))
    return nnx.to_pure_dict(nnx.split(network)[1])


def init_caches(config: Config, batch: int, chunk: int) -> list[Cache]:
    """Empty caches, one a layer, for `batch` sequences that are decoded `chunk` tokens at a time.

    The past has room for `block_size` positions and a chunk that begins after the last.
    """
    c = config

    def empty(length: int) -> KeysValues:
        zeros_PSH = jnp.zeros((batch * c.kv_heads, length, c.head_dim), c.dtype)
        return KeysValues(zeros_PSH, zeros_PSH)

    return [Cache(empty(c.block_size + chunk), empty(chunk)) for _ in range(c.n_layer)]


def count_params(config: Config) -> int:
    """Parameters as nanoGPT counts them: without position embeddings, and without padding."""
    _, shapes, _ = split(config.replace(scan_layers=False))
    total = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes))
    rows = (1 if config.tie_embeddings else 2) * config.n_embd + config.head_bias
    padding = (config.padded_vocab_size - config.vocab_size) * rows
    positions = math.prod(shapes["pos_embed"]["kernel"].shape) if "pos_embed" in shapes else 0
    return total - positions - padding


def flops_per_token(config: Config) -> int:
    """Of a training step, forward and backward: 6 N + 12 L H Q T, PaLM's and nanoGPT's formula."""
    c = config
    return 6 * count_params(c) + 12 * c.n_layer * c.n_embd * c.block_size
