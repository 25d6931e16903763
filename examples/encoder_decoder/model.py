"""An encoder-decoder (Vaswani et al. 2017): it reads a source, and writes a target.

The encoder reads the whole source. The decoder writes the target from left to right, and looks at
the source by cross-attention.

Array names end with their axes: B batch, T target length, S source length, D embedding, N heads,
H head dim, V vocabulary, L layers.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.lecture.cross_attention import OUTPUT_SITE, WEIGHTS_SITE, CrossAttention
from jaxgpt.config import Config, PositiveInt, UserError
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.kernels.platform import accum_dtype
from jaxgpt.model import (
    MLP,
    OUTPUT_EQUATION,
    Attention,
    Block,
    Context,
    Embedding,
    Linear,
    Norm,
    abstract_model,
    cap_and_mask,
)

PAD_ID, START_ID = 0, 1  # after a source that is short, and before a target
# Keys of `Config` that the model does not read; `validate` rejects other values.
ABSENT_KEYS = (
    *("n_kv_head", "position", "norm_position", "norm_gain", "qk_norm", "value_residual"),
    *("tie_embeddings", "sliding_window", "document_mask", "remat", "scan_layers"),
)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(Config):
    """A run of the encoder-decoder; `n_layer` is the depth of both stacks of blocks.

    A window of the data is a source, `START_ID` and a target.
    """

    source_length: PositiveInt = 28
    """Length of the longest source; the rest of `block_size` is that of the target."""
    tie_embeddings: bool = False
    """The output layer has weights of its own."""

    def validate(self) -> None:
        super().validate()
        self.check_absent(ABSENT_KEYS, "the encoder-decoder")
        if self.target_length < 1:
            problem = "leaves no room for a target"
            limit = f"expected less than block_size={self.block_size}"
            raise UserError(f"source_length={self.source_length}: {problem}; {limit}")

    @property
    def target_length(self) -> int:
        return self.block_size - self.source_length

    def make_model(self, rngs: nnx.Rngs) -> "EncoderDecoder":
        return EncoderDecoder(self, rngs=rngs)


class SourceAttention(CrossAttention):
    """Cross-attention that never attends to padding."""

    def attend(
        self, x_BTD, source_BSD, is_char_BS, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """Return the output [B, T, D] and the attention weights [B, N, T, S] before dropout."""
        q_BTNH = self.q(x_BTD)
        k_BSNH, v_BSNH = jnp.unstack(self.kv(source_BSD), axis=2)
        product = partial(jnp.einsum, preferred_element_type=accum_dtype(q_BTNH))
        scores_BNTS = product("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / self.config.head_dim**0.5
        lowest = jnp.finfo(scores_BNTS.dtype).min  # finite, for a source of padding alone
        weights_BNTS = jax.nn.softmax(jnp.where(is_char_BS[:, None, None], scores_BNTS, lowest))
        dropped_BNTS = weights_BNTS.astype(v_BSNH.dtype)
        if self.config.attention_dropout:
            dropped_BNTS = context.dropout(dropped_BNTS, context.layer, WEIGHTS_SITE)
        o_BTD = self.out(jnp.einsum("BNTS,BSNH->BTNH", dropped_BNTS, v_BSNH))
        return context.dropout(o_BTD, context.layer, OUTPUT_SITE), weights_BNTS


class DecoderBlock(nnx.Module):
    """Causal self-attention, cross-attention and an MLP, each with a norm before it."""

    def __init__(self, c: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        norm = partial(Norm, c.norm, c.n_embd, bias=c.bias)
        self.ln_1, self.ln_2, self.ln_3 = norm(), norm(), norm()
        self.attn = Attention(c, rngs=rngs)
        self.cross = SourceAttention(c, rngs=rngs)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(self, x_BTD, source_BSD, is_char_BS, context) -> tuple[jax.Array, jax.Array]:
        """Return the residual stream [B, T, D] and the cross-attention weights [B, N, T, S]."""
        attn_BTD, _ = self.attn(self.ln_1(x_BTD), context)
        x_BTD = x_BTD + attn_BTD
        cross_BTD, weights_BNTS = self.cross.attend(
            self.ln_2(x_BTD), source_BSD, is_char_BS, context
        )
        x_BTD = x_BTD + cross_BTD
        return x_BTD + self.mlp(self.ln_3(x_BTD), context), weights_BNTS


class EncoderDecoder(nnx.Module):
    """Two stacks of blocks, with one embedding for the tokens of both sequences."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        V, D = c.padded_vocab_size, c.n_embd
        self.embed = Embedding("VD", V, D, rngs=rngs)
        self.source_pos = Embedding("TD", c.source_length, D, rngs=rngs)
        self.target_pos = Embedding("TD", c.target_length, D, rngs=rngs)
        sees_all, sees_past = c.replace(causal=False), c.replace(causal=True)
        self.encoder = nnx.List([Block(sees_all, rngs=rngs) for _ in range(c.n_layer)])
        self.decoder = nnx.List([DecoderBlock(sees_past, rngs=rngs) for _ in range(c.n_layer)])
        self.ln_source = Norm(c.norm, D, bias=c.bias)
        self.ln_f = Norm(c.norm, D, bias=c.bias)
        self.lm_head = Linear(OUTPUT_EQUATION, V, D, bias=False, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, dropout: Dropout = Dropout()) -> jax.Array:
        """Return logits for windows without their last token, both of length S + T.

        The logits at the source's positions are zeros, because no token of the source is predicted.
        """
        S = self.config.source_length
        source_BS, target_BT = tokens_BT[:, :S], tokens_BT[:, S:]
        source_BSD = self.encode(source_BS, dropout)
        logits_BTV, _ = self.decode(target_BT, source_BSD, source_BS != PAD_ID, dropout)
        return jnp.pad(logits_BTV, [(0, 0), (S, 0), (0, 0)])

    def encode(self, source_BS: jax.Array, dropout: Dropout = Dropout()) -> jax.Array:
        """Return a vector per position, [B, S, D], each computed from the whole source."""
        x_BSD = self.embed(source_BS, self.config.dtype) + self.source_pos.kernel[...]
        x_BSD = dropout(x_BSD, 0, DropoutSite.EMBEDDING)
        # padding is a segment of its own, which no character attends to
        context = Context(dropout, segment_ids_BT=source_BS != PAD_ID)
        for layer, block in enumerate(self.encoder):
            x_BSD, _ = block(x_BSD, replace(context, layer=layer))
        return self.ln_source(x_BSD)

    def decode(
        self, target_BT, source_BSD, is_char_BS, dropout: Dropout = Dropout()
    ) -> tuple[jax.Array, jax.Array]:
        """Return the logits [B, T, V] of the tokens after each of `START_ID` and the target.

        Return also the cross-attention weights of all layers, [L, B, N, T, S].
        """
        x_BTD = self.embed(target_BT, self.config.dtype) + self.target_pos.kernel[...]
        first = self.config.n_layer  # after the encoder's layers, for other masks
        weights = []
        x_BTD = dropout(x_BTD, first, DropoutSite.EMBEDDING)
        for layer, block in enumerate(self.decoder, start=first):
            context = Context(dropout, layer)
            x_BTD, weights_BNTS = block(x_BTD, source_BSD, is_char_BS, context)
            weights.append(weights_BNTS)
        logits_BTV: Any = self.lm_head(self.ln_f(x_BTD))
        return cap_and_mask(logits_BTV, self.config), jnp.stack(weights)


@partial(jax.jit, static_argnums=0)
def translate(config: EncoderDecoderConfig, params: dict, source_BS: jax.Array) -> tuple:
    """Write the most likely token, T times.

    Return the targets, int32 [B, T], and the cross-attention weights of all layers,
    [L, B, N, T, S]: row t has those with which target t was written.
    """
    model = nnx.merge(abstract_model(config).graphdef, params)
    source_BSD, is_char_BS = model.encode(source_BS), source_BS != PAD_ID
    predict = lambda target_BT: model.decode(target_BT[:, :-1], source_BSD, is_char_BS)

    def write(t: jax.Array, target_BT: jax.Array) -> jax.Array:
        logits_BTV, _ = predict(target_BT)
        return target_BT.at[:, t + 1].set(logits_BTV[:, t].argmax(axis=-1))

    target_BT = jnp.full((len(source_BS), 1 + config.target_length), START_ID)
    target_BT = jax.lax.fori_loop(0, config.target_length, write, target_BT)
    return target_BT[:, 1:], predict(target_BT)[1]
