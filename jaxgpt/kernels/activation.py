"""Non-linearities of the MLP."""

import math
from functools import partial

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x times the normal distribution function (Hendrycks & Gimpel 2016).

    By erf and not by erfc, which XLA:CPU does not vectorise (performance.md, "Exact GELU").
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh_reference(x: jax.Array) -> jax.Array:
    """GELU by tanh, as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


def gelu_tanh_gpu(x: jax.Array) -> jax.Array:
    """Recompute GELU in its gradient's kernel, instead of keeping intermediate arrays."""
    return jax.checkpoint(partial(jax.nn.gelu, approximate=True))(x)


def relu2(x: jax.Array) -> jax.Array:
    """Squared ReLU (So et al. 2021, "Primer")."""
    return jnp.square(jax.nn.relu(x))
