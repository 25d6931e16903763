"""The config of the lecture's models: the core's keys, and those that only the lecture needs."""

from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
from flax import nnx

from jaxgpt.config import Config, UserError

# Keys of the core that the lecture's model does not read.
ABSENT_KEYS = (
    "n_kv_head",
    "qk_norm",
    "logit_softcap",
    "sliding_window",
    "causal",
    "value_residual",
    "document_mask",
    "zero_init_projections",
    "remat",
    "scan_layers",
)

# Names that the lecture's keys had in checkpoints of format 1.
OLD_KEYS = {
    "out_projection": "attention_output_proj",
    "score_scale": "attention_scale",
    "head_bias": "lm_head_bias",
    "decay_all": "decay_bias_and_norm",
}


@dataclass(frozen=True, kw_only=True)
class LectureConfig(Config):
    """A run of one of the lecture's models. With the defaults of its keys, the model is GPT-2."""

    # Redefined, because some values are only here and some only in the core.
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"  # pyright: ignore
    """Type of normalisation; `none` leaves out all norms."""
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "none"] = "gelu_tanh"  # pyright: ignore
    """Non-linearity of the feed-forward network; `none` leaves out the network."""
    position: Literal["learned", "sinusoidal", "none"] = "learned"
    """Position encoding."""

    residual: bool = True
    """Add the output of each branch to its input; False replaces the input by the output."""
    attention_output_proj: bool = True
    """Mix the heads of attention by a linear map; False only concatenates them."""
    attention_scale: Literal["head", "embedding"] = "head"
    """Divide attention scores by the square root of this width: a head's, or n_embd."""
    qkv_bias: bool = True
    """With `bias`, also biases of query, key and value."""
    lm_head_bias: bool = False
    """A bias of the output layer, one number per token id."""
    embed_dropout: bool = True
    """Also apply dropout to embeddings, as GPT-2 does."""
    init: Literal["gpt2", "torch"] = "gpt2"
    """Initial weights: those of GPT-2, or of PyTorch's Linear and Embedding."""
    decay_bias_and_norm: bool = False
    """Also decay biases and norms, as PyTorch's AdamW does by default."""

    @classmethod
    def from_dict(cls, keys: dict[str, Any]) -> Self:
        """Build a config from these keys, which may have their old names."""
        return super().from_dict({OLD_KEYS.get(key, key): keys[key] for key in keys})

    def validate(self) -> None:
        super().validate()
        for key in ABSENT_KEYS:
            value, default = getattr(self, key), getattr(Config, key)
            if value != default:
                raise UserError(f"{key}={value!r}: the lecture's models only have {default!r}")

    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        from examples.lecture.model import LectureGPT

        return LectureGPT(self, rngs=rngs)

    def weight_decay_mask(self, params: Any) -> Any:
        if self.decay_bias_and_norm:
            return jax.tree.map(lambda _: True, params)
        return super().weight_decay_mask(params)
