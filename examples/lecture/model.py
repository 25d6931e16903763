"""Define the lecture's model. Its config selects the parts, from a bigram to the whole GPT.

B batch, T length, D embedding, N heads, H head dim, F feed-forward hidden, V vocabulary (padded),
C parts of a fused map (query, key, value).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.lecture.config import LectureConfig
from jaxgpt import kernels
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.kernels.position import sinusoids
from jaxgpt.model import (
    ACTIVATIONS,
    INIT_STD,
    OUTPUT_EQUATION,
    Embedding,
    Linear,
    Norm,
    cap_and_mask,
    residual_std,
)
from jaxgpt.sharding import constrain_batch

# ---- parts, with the initial weights that the config selects ---------------------------------


def torch_uniform(rngs: nnx.Rngs, fan_in: int, shape: Sequence[int]) -> jax.Array:
    """Draw the initial weight or bias of PyTorch's Linear: uniform within ±1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


class TorchLinear(Linear):
    """The core's linear map with the initial weights of PyTorch's Linear."""

    def __init__(self, equation: str, *shape: int, bias: bool, rngs: nnx.Rngs):
        self.equation = equation
        axes, out_axes = equation.split(",")[1].split("->")
        kept = [i for i, axis in enumerate(axes) if axis in out_axes]
        bias_shape = [shape[i] for i in kept]
        fan_in = math.prod(shape) // math.prod(bias_shape)
        self.kernel = nnx.Param(torch_uniform(rngs, fan_in, shape), axes=axes)
        bias_value = torch_uniform(rngs, fan_in, bias_shape) if bias else None
        bias_axes = "".join(axes[i] for i in kept)
        self.bias = nnx.Param(bias_value, axes=bias_axes) if bias else None


class TorchEmbedding(Embedding):
    """The core's embedding with the initial weights of PyTorch's Embedding, a standard normal."""

    def __init__(self, axes: str, *shape: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape), axes=axes)


def make_linear(
    c: LectureConfig,
    equation: str,
    *shape: int,
    bias: bool,
    rngs: nnx.Rngs,
    std: float = INIT_STD,
) -> Linear:
    """Return a linear map with PyTorch's initial weights, or normal ones with deviation `std`."""
    if c.init == "torch":
        return TorchLinear(equation, *shape, bias=bias, rngs=rngs)
    return Linear(equation, *shape, bias=bias, rngs=rngs, std=std)


def make_norm(c: LectureConfig) -> Callable[[jax.Array], jax.Array]:
    """Return the norm that the config selects; for `none` it changes nothing."""
    return identity if c.norm == "none" else Norm(c.norm, c.n_embd, bias=c.bias)


def identity(x: jax.Array) -> jax.Array:
    """Return the input unchanged."""
    return x


# ---- the model -------------------------------------------------------------------------------


class MultiHeadAttention(nnx.Module):
    """The heads of self-attention, computed at once: the head is one more axis, like the batch."""

    def __init__(self, c: LectureConfig, *, rngs: nnx.Rngs):
        D, N, H = c.n_embd, c.n_head, c.head_dim
        has_bias = c.bias and c.qkv_bias
        self.qkv = make_linear(c, "BTD,DCNH->BTCNH", D, 3, N, H, bias=has_bias, rngs=rngs)
        if c.attention_output_proj:
            std = residual_std(c)
            self.out = make_linear(c, "BTNH,NHD->BTD", N, H, D, bias=c.bias, rngs=rngs, std=std)
        self.scale = (c.n_embd if c.attention_scale == "embedding" else c.head_dim) ** -0.5
        self.config: Any = c

    def __call__(self, x_BTD: jax.Array, layer: int, dropout: Dropout) -> jax.Array:
        """Return the attention output, [B, T, D]."""
        c = self.config
        weights_dropout = None
        if c.attention_dropout:
            weights_dropout = dropout.bind(layer, DropoutSite.ATTENTION_WEIGHTS)
        heads_BTNH = kernels.dot_product_attention(
            *self.project(x_BTD),
            causal=True,
            dropout=weights_dropout,
            backend=c.attention,
            scale=self.scale,
        )
        if c.attention_output_proj:
            return dropout(self.out(heads_BTNH), layer, DropoutSite.ATTENTION_OUTPUT)
        # Heads that are split over devices are gathered before the concatenation, because XLA (jax
        # 0.10.2) computes a wrong gradient of the reshape of split heads on a mesh of three axes.
        return constrain_batch(heads_BTNH).reshape(x_BTD.shape)

    def project(self, x_BTD: jax.Array) -> list[jax.Array]:
        """Return the queries, keys and values of all heads, each [B, T, N, H]."""
        parts = jnp.split(self.qkv(x_BTD), 3, axis=2)
        return [part_BTCNH.squeeze(2) for part_BTCNH in parts]


class FeedForward(nnx.Module):
    """Two linear maps with a non-linearity between them, at each position separately."""

    def __init__(self, c: LectureConfig, *, rngs: nnx.Rngs):
        D, F = c.n_embd, c.mlp_hidden_dim
        self.up = make_linear(c, "BTD,DF->BTF", D, F, bias=c.bias, rngs=rngs)
        self.down = make_linear(c, "BTF,FD->BTD", F, D, bias=c.bias, rngs=rngs, std=residual_std(c))
        self.activation = ACTIVATIONS[c.mlp]

    def __call__(self, x_BTD: jax.Array, layer: int, dropout: Dropout) -> jax.Array:
        """Return the output of the network, [B, T, D]."""
        h_BTF = self.activation(self.up(x_BTD))
        return dropout(self.down(h_BTF), layer, DropoutSite.MLP_OUTPUT)


class Block(nnx.Module):
    """Attention, in which positions exchange information, followed by the feed-forward network."""

    def __init__(self, c: LectureConfig, *, rngs: nnx.Rngs):
        self.ln_1 = make_norm(c)
        self.attn = MultiHeadAttention(c, rngs=rngs)
        if c.mlp != "none":
            self.mlp = FeedForward(c, rngs=rngs)
            self.ln_2 = make_norm(c)
        self.config: Any = c

    def __call__(self, x_BTD: jax.Array, layer: int, dropout: Dropout = Dropout()) -> jax.Array:
        """Return the residual stream [B, T, D] after both branches."""
        x_BTD = self.apply_branch(self.attn, self.ln_1, x_BTD, layer, dropout)
        if self.config.mlp != "none":
            x_BTD = self.apply_branch(self.mlp, self.ln_2, x_BTD, layer, dropout)
        return constrain_batch(x_BTD)

    def apply_branch(
        self, branch: Callable, norm: Callable, x_BTD: jax.Array, layer: int, dropout: Dropout
    ) -> jax.Array:
        """Return the residual stream [B, T, D] after a branch, with the norm before or after it."""
        c = self.config
        branch_input_BTD = norm(x_BTD) if c.norm_position == "pre" else x_BTD
        h_BTD = branch(branch_input_BTD, layer, dropout)
        x_BTD = x_BTD + h_BTD if c.residual else h_BTD
        return norm(x_BTD) if c.norm_position == "post" else x_BTD


class LectureGPT(nnx.Module):
    """The lecture's GPT, from token ids to logits. Without blocks it is the bigram model."""

    def __init__(self, config: LectureConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        V, D = c.padded_vocab_size, c.n_embd
        make_embedding = TorchEmbedding if c.init == "torch" else Embedding
        self.embed = make_embedding("VD", V, D, rngs=rngs)
        if c.position == "learned":
            self.pos_embed = make_embedding("TD", c.block_size, D, rngs=rngs)
        keys = jax.random.split(rngs.params(), c.n_layer)
        self.blocks = nnx.List([Block(c, rngs=nnx.Rngs(params=key)) for key in keys])
        if c.norm_position == "pre":
            self.ln_f = make_norm(c)
        if not c.tie_embeddings:
            self.lm_head = make_linear(c, "BTD,VD->BTV", V, D, bias=False, rngs=rngs)
        if c.lm_head_bias:
            bias_V = torch_uniform(rngs, D, [V]) if c.init == "torch" else jnp.zeros(V)
            self.head_bias = nnx.Param(bias_V, axes="V")

    def __call__(self, tokens_BT: jax.Array, dropout: Dropout = Dropout()) -> jax.Array:
        """Return the logits [B, T, V] for token ids [B, T]."""
        c = self.config
        x_BTD = self.embed_tokens(tokens_BT)
        if c.embed_dropout:
            x_BTD = dropout(x_BTD, c.n_layer, DropoutSite.EMBEDDING)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, layer, dropout)
        if c.norm_position == "pre":
            x_BTD = self.ln_f(x_BTD)
        return self.logits(x_BTD)

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the sum of the token and position vectors, [B, T, D]."""
        c, T = self.config, tokens_BT.shape[1]
        x_BTD = constrain_batch(self.embed(tokens_BT, c.dtype))
        if c.position == "learned":
            x_BTD = kernels.add_positions(x_BTD, self.pos_embed.kernel[:T].astype(c.dtype))
        if c.position == "sinusoidal":
            table_BTD = sinusoids(jnp.arange(T)[None], c.n_embd)
            x_BTD = x_BTD * math.sqrt(c.n_embd) + table_BTD.astype(c.dtype)
        return x_BTD

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return the logits [B, T, V]; those of padded ids are -inf."""
        c = self.config
        head = self.embed if c.tie_embeddings else self.lm_head
        logits_BTV: Any = kernels.linear_map(OUTPUT_EQUATION, x_BTD, head.kernel[...])
        if c.lm_head_bias:
            logits_BTV += self.head_bias[...].astype(x_BTD.dtype)
        return cap_and_mask(logits_BTV, c)
