"""Define cross-attention for an encoder-decoder: queries of one sequence, keys of another.

B batch, T query length, S key length, D embedding, N heads, K key-value heads, H head dim,
C parts of a fused map (key, value).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt import kernels
from jaxgpt.config import ModelConfig
from jaxgpt.kernels.dropout import Dropout
from jaxgpt.model import Linear, Norm, residual_std

# Separate dropout sites, so that the masks differ from those of self-attention in the same layer.
WEIGHTS_SITE, OUTPUT_SITE = 4, 5


class CrossAttention(nnx.Module):
    """Attention whose keys and values come from a source, such as the output of an encoder.

    Every query attends to the whole source (Vaswani et al. 2017). Queries and source have separate
    positions, so there is no rotary encoding, no causal mask and no window.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = c.n_embd, c.n_head, c.kv_heads, c.head_dim
        linear = partial(Linear, bias=c.bias, rngs=rngs)
        self.q = linear("BTD,DNH->BTNH", D, N, H)
        self.kv = linear("BSD,DCKH->BSCKH", D, 2, K, H)
        self.out = linear("BTNH,NHD->BTD", N, H, D, std=residual_std(c))
        if c.qk_norm:
            self.q_norm = Norm("rmsnorm", H, "H")
            self.k_norm = Norm("rmsnorm", H, "H")
        self.config: Any = c

    def __call__(
        self,
        x_BTD: jax.Array,
        source_BSD: jax.Array,
        layer: int | jax.Array = 0,
        dropout: Dropout = Dropout(),
    ) -> jax.Array:
        """Return the output [B, T, D] for queries from x [B, T, D] and a source [B, S, D]."""
        c = self.config
        q_BTNH = self.q(x_BTD)
        k_BSKH, v_BSKH = jnp.unstack(self.kv(source_BSD), axis=2)
        if c.qk_norm:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
        weights_dropout = dropout.bind(layer, WEIGHTS_SITE) if c.attention_dropout else None
        heads_BTNH = kernels.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, causal=False, dropout=weights_dropout, backend=c.attention
        )
        return dropout(self.out(heads_BTNH), layer, OUTPUT_SITE)
