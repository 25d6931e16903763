"""Non-linearities of the MLP; all are elementwise and keep x's dtype."""

import math

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import over_batch

GELU_TANH = math.sqrt(2 / math.pi), 0.044715  # GELU is x / 2 (1 + tanh(a (x + b x^3)))


def gelu(x: jax.Array) -> jax.Array:
    """Compute exact GELU, x times the normal distribution function (Hendrycks & Gimpel 2016).

    XLA:CPU does not vectorise erfc, which `jax.nn.gelu` uses (docs/performance.md, "GELU by erf").
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh_reference(x: jax.Array) -> jax.Array:
    """Compute GELU by tanh, as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


@jax.custom_vjp
def gelu_tanh_gpu(x: jax.Array) -> jax.Array:
    """Compute GELU by tanh in the form that XLA fuses into the product before it.

    cuBLASLt then writes both x and its GELU. One kernel computes the gradient from x
    (docs/performance.md, "GELU in the matrix product").
    """
    a, b = GELU_TANH
    return x * (0.5 * (1.0 + jnp.tanh(a * (x + b * (x * (x * x))))))


def _gelu_tanh_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu_tanh_gpu(x), x


def _gelu_tanh_bwd(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    from jaxgpt.kernels import triton

    last_axis = "tensor" if x.ndim == 3 else None
    run = over_batch(lambda x, dy: triton.scaled(gelu_tanh_slope, x, dy), last_axis)
    return (run(x, dy),)


gelu_tanh_gpu.defvjp(_gelu_tanh_fwd, _gelu_tanh_bwd)


def gelu_tanh_slope(x: jax.Array) -> jax.Array:
    """Return the derivative of GELU by tanh, x sigmoid(u)."""
    a, b = GELU_TANH
    u = 2 * a * (x + b * x * x * x)
    du = 2 * a * (1 + 3 * b * x * x)
    sigmoid = 1 / (1 + jnp.exp(-u))
    return sigmoid * (1 + x * (1 - sigmoid) * du)


def relu2(x: jax.Array) -> jax.Array:
    """Compute squared ReLU (So et al. 2021, "Primer")."""
    return jnp.square(jax.nn.relu(x))
