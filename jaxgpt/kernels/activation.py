"""Non-linearities of the MLP; all are elementwise and keep x's dtype."""

import math

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """Compute exact GELU, x times the normal distribution function (Hendrycks & Gimpel 2016).

    XLA:CPU does not vectorise erfc, which `jax.nn.gelu` uses (docs/performance.md, "GELU by erf").
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh_reference(x: jax.Array) -> jax.Array:
    """Compute GELU by tanh, as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


def gelu_tanh_gpu(x: jax.Array) -> jax.Array:
    """Compute GELU by tanh, and again in the gradient instead of keeping intermediate arrays."""
    # (docs/performance.md, "Recomputed tanh GELU")
    return jax.checkpoint(gelu_tanh_reference)(x)


def relu2(x: jax.Array) -> jax.Array:
    """Compute squared ReLU (So et al. 2021, "Primer")."""
    return jnp.square(jax.nn.relu(x))
