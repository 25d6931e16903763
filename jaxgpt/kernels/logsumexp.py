"""The logarithm of the sum of exp(x) over the last axis, for the cross-entropy."""

import jax
import jax.numpy as jnp

NEG_INF = -1e30  # finite, because -inf minus itself is not a number


def logsumexp_reference(x: jax.Array) -> jax.Array:
    """Compute it in two passes over x: the maximum, then the sum."""
    return jax.nn.logsumexp(x, axis=-1)


@jax.custom_vjp
def logsumexp_gpu(x: jax.Array) -> jax.Array:
    """Read x once, with the running maximum and sum of an online softmax.

    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; performance.md,
    "logarithm of the sum of exponentials".
    """

    def join(a: tuple, b: tuple) -> tuple[jax.Array, jax.Array]:
        maximum = jnp.maximum(a[0], b[0])
        total = a[1] * jnp.exp(a[0] - maximum) + b[1] * jnp.exp(b[0] - maximum)
        return maximum, total

    start = jnp.asarray(NEG_INF, x.dtype), jnp.zeros((), x.dtype)
    operands = jnp.maximum(x, NEG_INF), jnp.ones_like(x)
    maximum, total = jax.lax.reduce(operands, start, join, (x.ndim - 1,))
    return maximum + jnp.log(total)


def _fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    lse = logsumexp_gpu(x)
    return lse, (x, lse)


def _bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, lse = saved
    return (jnp.exp(x - lse[..., None]) * dy[..., None],)


logsumexp_gpu.defvjp(_fwd, _bwd)
