"""Define the config of the lecture's models: the core's keys and those that only they need."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx

from jaxgpt.config import Config

# Keys of `Config` that the lecture's model does not read; `validate` rejects other values.
ABSENT_KEYS = (
    "n_kv_head",
    "norm_gain",
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


@dataclass(frozen=True, kw_only=True)
class LectureConfig(Config):
    """A run of one of the lecture's models. With all defaults, the model is GPT-2 124M."""

    # Redefined, because the lecture's model has other values than the core.
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"  # pyright: ignore
    """Type of normalisation; `none` leaves out all norms."""
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "none"] = "gelu_tanh"  # pyright: ignore
    """Non-linearity of the feed-forward network; `none` leaves out the network."""
    position: Literal["learned", "sinusoidal", "none"] = "learned"
    """Position encoding."""

    residual: bool = True
    """Add the output of each branch to its input; False replaces the input with the output."""
    attention_output_proj: bool = True
    """Mix the heads of attention by a linear map; False only concatenates the heads."""
    attention_scale: Literal["head", "embedding"] = "head"
    """Divide attention scores by the square root of this width: a head's, or n_embd (embedding)."""
    qkv_bias: bool = True
    """Biases of query, key and value; only with `bias`."""
    lm_head_bias: bool = False
    """Bias of the output layer, one number per token id."""
    embed_dropout: bool = True
    """Also apply dropout to embeddings, as GPT-2 does."""
    init: Literal["gpt2", "torch"] = "gpt2"
    """Initial weights: those of GPT-2, or of PyTorch's Linear and Embedding."""
    decay_bias_and_norm: bool = False
    """Also decay biases and norms, as PyTorch's AdamW does by default."""

    def validate(self) -> None:
        """Raise `UserError` for keys that do not fit together or that this model does not have."""
        super().validate()
        self.check_absent(ABSENT_KEYS, "the lecture's model")

    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Build the lecture's model, with initial weights drawn from `rngs`."""
        from examples.lecture.model import LectureGPT

        return LectureGPT(self, rngs=rngs)

    def weight_decay_mask(self, params: Any) -> Any:
        """Return a tree of bools like `params`: which parameters decay."""
        if self.decay_bias_and_norm:
            return jax.tree.map(lambda _: True, params)
        return super().weight_decay_mask(params)
