"""A GPT for a speedrun: a GPT-2 with parts that let it reach a loss in fewer tokens.

Array names end with their axes, as in jaxgpt/model.py: B batch, T length, D embedding, N heads,
H head dim, F MLP width, V vocabulary. Most parts come from modded-nanogpt (Jordan et al. 2024);
"record N" is a record in its history. docs/speedrun.md has all sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt import kernels
from jaxgpt.config import Config, NonNegativeFloat, NonNegativeInt, Range, UserError
from jaxgpt.kernels.dropout import Dropout
from jaxgpt.kernels.position import apply_rope
from jaxgpt.model import (
    ACTIVATIONS,
    INIT_STD,
    OUTPUT_EQUATION,
    Embedding,
    Linear,
    Norm,
    cap_and_mask,
)
from jaxgpt.sharding import constrain_batch

# Keys of `Config` that the speedrun's model does not read; `validate` rejects other values.
ABSENT_KEYS = (
    *("n_kv_head", "dropout", "attention_dropout", "bias", "norm_gain", "norm_position", "causal"),
    *("value_residual", "document_mask", "remat", "scan_layers"),
)


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig(Config):
    """A run of the speedrun's model; `parts` says which keys take each part out.

    Parts that gained nothing in the study of docs/speedrun.md are off by default;
    configs/speedrun_gpt2.py turns them on.
    """

    parts: ClassVar = {
        "rotary positions": {"position": "learned"},
        "QK-norm": {"qk_norm": False},
        "ReLU²": {"mlp": "gelu_tanh"},
        "zero-initialised projections": {"zero_init_projections": False},
        "soft cap": {"logit_softcap": 0.0},
        "value embeddings": {"value_embeddings": 0},
        "embedding shortcut": {"embedding_shortcut": False},
        "U-net skips": {"unet_skips": False},
        "untied head": {"tie_embeddings": True},
        "NorMuon's second moment": {"optimizer": "muon"},
        "Muon": {"optimizer": "adamw"},
        "Polar Express": {"muon_polynomial": "jordan", "muon_iterations": 5},
        "Muon per head": {"muon_per_head": False},
        "warm-up, stable, decay": {"lr_schedule": "cosine"},
        "slower embeddings": {"embedding_lr_scale": 1.0},
    }

    training_keys: ClassVar = (
        *("first_window", "window_sizes", "embedding_lr_scale", "scalar_lr_scale"),
    )

    qk_norm: bool = True
    """RMS-normalise queries and keys, without a gain (record 5)."""
    # Redefined, because this model has other values than the core.
    mlp: Literal["relu2", "gelu_tanh"] = "relu2"  # pyright: ignore
    """Non-linearity of the MLP: max(0, x)² or GELU by tanh (record 5)."""
    position: Literal["rope", "learned"] = "rope"  # pyright: ignore
    """Position encoding (record 2)."""
    norm: Literal["rmsnorm"] = "rmsnorm"  # pyright: ignore
    """Type of normalisation."""
    norm_gain: bool = False
    """Norms have no gains."""
    bias: bool = False
    """Linear layers have no biases."""
    zero_init_projections: bool = False
    """Branches and an untied output layer start at zero (record 5)."""
    logit_softcap: NonNegativeFloat = 0.0
    """Soft cap c: logits become c tanh(logits / c) (records 9 and 18: 15); 0 means none."""
    value_embeddings: NonNegativeInt = 0
    """Number of tables with a value per token. Table i is mixed, with learned weights, into the
    values of layers i and n_layer - 1 - i (records 14 and 15)."""
    embedding_shortcut: bool = False
    """Mix the normalised embedding into every block's input, with learned weights (record 9)."""
    unet_skips: bool = False
    """Add the output of block i to the input of block n_layer - 1 - i, with a learned weight
    (record 11)."""
    tie_embeddings: bool = False
    """Share the token embedding with the output layer (untied: record 8)."""
    first_window: NonNegativeInt = 0
    """Attention window of the first steps, in tokens; 0 means no warm-up (record 13)."""
    window_sizes: Annotated[int, Range(2)] = 3
    """Number of windows, each for as many steps: they grow from `first_window` to `sliding_window`,
    or to the whole context, and each is compiled once."""
    embedding_lr_scale: NonNegativeFloat = 1.0
    """Learning rate of embeddings, relative to `learning_rate`."""
    scalar_lr_scale: NonNegativeFloat = 1.0
    """Learning rate of the weights by which arrays are mixed, relative to `learning_rate`."""

    def validate(self) -> None:
        super().validate()
        self.check_absent(ABSENT_KEYS, "the speedrun's model")
        if 2 * self.value_embeddings > self.n_layer:
            most = self.n_layer // 2
            limit = f"expected at most {most} for n_layer={self.n_layer}"
            problem = f"value_embeddings={self.value_embeddings}: too many tables"
            raise UserError(f"{problem}; {limit}; try value_embeddings={most}")
        if self.first_window > self.last_window:
            problem = f"first_window={self.first_window}: larger than the last window"
            raise UserError(f"{problem}; expected at most {self.last_window}")

    @property
    def last_window(self) -> int:
        return self.sliding_window or self.block_size

    @property
    def projection_std(self) -> float:
        """Initial std of each branch's last layer, and of an untied output layer."""
        return 0.0 if self.zero_init_projections else INIT_STD

    def make_model(self, rngs: nnx.Rngs) -> "SpeedrunGPT":
        return SpeedrunGPT(self, rngs)

    def learning_rate_scale(self, params: dict) -> dict:
        """Return the factor of `learning_rate` for each parameter."""

        def scale(path: tuple, _: Any) -> float:
            name = path[-1].key
            if name == "weights":
                return self.scalar_lr_scale
            return self.embedding_lr_scale if "embed" in path[0].key else 1.0

        return jax.tree.map_with_path(scale, params)

    def phases(self) -> Mapping[int, Self]:
        """Return the config of each window size, by the first step that uses it."""
        if not self.first_window:
            return {0: self}
        growth = (self.last_window - self.first_window) / (self.window_sizes - 1)
        windows = [round(self.first_window + i * growth) for i in range(self.window_sizes)]
        steps = self.lr_decay_iters or self.max_iters
        starts = [steps * i // self.window_sizes for i in range(self.window_sizes)]
        first = {s: self.replace(sliding_window=w) for s, w in zip(starts, windows, strict=True)}
        return first | {starts[-1]: self}


class SpeedrunGPT(nnx.Module):
    """A decoder-only transformer: token ids [B, T] -> logits [B, T, V]."""

    def __init__(self, config: SpeedrunConfig, rngs: nnx.Rngs):
        c = self.config = config
        V, D = c.padded_vocab_size, c.n_embd
        self.embed = Tables(c, rngs)
        if c.position == "learned":
            self.pos_embed = Embedding("TD", c.block_size, D, rngs=rngs)
        self.blocks = nnx.List([Block(c, layer, rngs) for layer in range(c.n_layer)])
        self.norm = Norm("rmsnorm", D, gain=False)
        if not c.tie_embeddings:
            linear = partial(Linear, OUTPUT_EQUATION, bias=False, rngs=rngs)
            self.lm_head = linear(V, D, std=c.projection_std)

    def __call__(self, tokens_BT: jax.Array, dropout: Dropout = Dropout()) -> jax.Array:
        c = self.config
        x_BTD = constrain_batch(self.embed.tokens(tokens_BT, c.dtype))
        if c.position == "learned":
            x_BTD += self.pos_embed.kernel[...][: tokens_BT.shape[1]].astype(c.dtype)
        x_BTD = embedding_BTD = self.norm(x_BTD)
        values = [constrain_batch(table(tokens_BT, c.dtype)) for table in self.embed.values]
        outputs = []
        for layer, block in enumerate(self.blocks):
            opposite = c.n_layer - 1 - layer
            skip_BTD = outputs[opposite] if opposite < layer else None
            pair = min(layer, opposite)
            value_BTD = values[pair] if pair < len(values) else None
            x_BTD = block(x_BTD, embedding_BTD, skip_BTD, value_BTD)
            outputs.append(x_BTD)
        return self.logits(self.norm(x_BTD))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits [B, T, V]; the logits of padded ids are -inf."""
        c = self.config
        kernel_VD = (self.embed.tokens if c.tie_embeddings else self.lm_head).kernel[...]
        logits_BTV = kernels.linear_map(OUTPUT_EQUATION, x_BTD, kernel_VD)
        return cap_and_mask(logits_BTV, c)


class Tables(nnx.Module):
    """The tables with a row per token: the embedding, and values for attention.

    They are in one module, because the training step keeps the parameters of `embed` in float32.
    """

    def __init__(self, c: SpeedrunConfig, rngs: nnx.Rngs):
        table = partial(Embedding, "VD", c.padded_vocab_size, c.n_embd, rngs=rngs)
        self.tokens = table()
        self.values = nnx.List([table() for _ in range(c.value_embeddings)])


class Block(nnx.Module):
    """Attention and MLP, each with a norm before it, added to a learned mix of earlier arrays."""

    def __init__(self, c: SpeedrunConfig, layer: int, rngs: nnx.Rngs):
        self.norm = Norm("rmsnorm", c.n_embd, gain=False)
        pair = min(layer, c.n_layer - 1 - layer)
        self.attn = Attention(c, has_values=pair < c.value_embeddings, rngs=rngs)
        self.mlp = MLP(c, rngs)
        if c.embedding_shortcut:
            self.shortcut = WeightedSum(1.0, 0.0)
        if c.unet_skips and layer >= (c.n_layer + 1) // 2:
            self.skip = WeightedSum(1.0)

    def __call__(self, x_BTD, embedding_BTD, skip_BTD, value_BTD) -> jax.Array:
        if hasattr(self, "skip"):
            x_BTD = x_BTD + self.skip(skip_BTD)
        if hasattr(self, "shortcut"):
            x_BTD = self.shortcut(x_BTD, embedding_BTD)
        x_BTD, h_BTD = kernels.residual_and_norm(x_BTD, self.norm)
        x_BTD = x_BTD + self.attn(h_BTD, value_BTD)
        x_BTD, h_BTD = kernels.residual_and_norm(x_BTD, self.norm)
        return constrain_batch(x_BTD + self.mlp(h_BTD))


class WeightedSum(nnx.Module):
    """A sum of arrays with learned weights, one number per array."""

    def __init__(self, *start: float):
        self.weights = nnx.Param(jnp.array(start))

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        weights = self.weights[...]  # float32, so that their gradients are summed in float32
        total = weights[0] * arrays[0]
        for i in range(1, len(arrays)):
            total = total + weights[i] * arrays[i]
        return total.astype(arrays[0].dtype)


class Attention(nnx.Module):
    """Causal attention with rotary positions, QK-norm and value embeddings."""

    def __init__(self, c: SpeedrunConfig, has_values: bool, rngs: nnx.Rngs):
        D, N, H = c.n_embd, c.n_head, c.head_dim
        linear = partial(Linear, bias=False, rngs=rngs)
        self.qkv = linear("BTD,DCNH->BTCNH", D, 3, N, H)
        self.out = linear("BTNH,NHD->BTD", N, H, D, std=c.projection_std)
        if has_values:
            self.value_mix = WeightedSum(0.5, 0.5)
        self.norm = Norm("rmsnorm", H, "H", gain=False)
        self.config: Any = c

    def __call__(self, x_BTD: jax.Array, value_BTD: jax.Array | None) -> jax.Array:
        c = self.config
        q_BTNH, k_BTNH, v_BTNH = self.qkv.parts(x_BTD)
        if value_BTD is not None:
            v_BTNH = self.value_mix(v_BTNH, value_BTD.reshape(v_BTNH.shape))
        if c.qk_norm:
            q_BTNH, k_BTNH = self.norm(q_BTNH), self.norm(k_BTNH)
        if c.position == "rope":
            positions_1T = jnp.arange(x_BTD.shape[1])[None]
            q_BTNH, k_BTNH = apply_rope(q_BTNH, positions_1T), apply_rope(k_BTNH, positions_1T)
        o_BTNH = kernels.dot_product_attention(
            q_BTNH, k_BTNH, v_BTNH, causal=True, window=c.sliding_window, backend=c.attention
        )
        return self.out(o_BTNH)


class MLP(nnx.Module):
    """Two linear maps with a non-linearity between them: max(0, x)² (So et al. 2021), or GELU."""

    def __init__(self, c: SpeedrunConfig, rngs: nnx.Rngs):
        D, F = c.n_embd, c.mlp_hidden_dim
        linear = partial(Linear, bias=False, rngs=rngs)
        self.up = linear("BTD,DF->BTF", D, F)
        self.down = linear("BTF,FD->BTD", F, D, std=c.projection_std)
        self.activation = ACTIVATIONS[c.mlp]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x_BTD)))
