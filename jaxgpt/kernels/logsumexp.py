"""Log-sum-exp, log(sum(exp(x))), over the last axis, for the cross-entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

NEG_INF = -1e30  # finite, because -inf - -inf is NaN


def logsumexp_reference(x: jax.Array) -> jax.Array:
    """Compute the log-sum-exp of x [..., V] in two passes: the maximum, then the sum."""
    return jax.nn.logsumexp(x, axis=-1)


def _one_pass(x: jax.Array) -> jax.Array:
    """Compute the log-sum-exp with a running maximum and sum (Milakov & Gimelshein 2018)."""

    def join(a: tuple, b: tuple) -> tuple[jax.Array, jax.Array]:
        maximum = jnp.maximum(a[0], b[0])
        total = a[1] * jnp.exp(a[0] - maximum) + b[1] * jnp.exp(b[0] - maximum)
        return maximum, total

    start = jnp.asarray(NEG_INF, x.dtype), jnp.zeros((), x.dtype)
    operands = jnp.maximum(x, NEG_INF), jnp.ones_like(x)
    maximum, total = jax.lax.reduce(operands, start, join, (x.ndim - 1,))
    return maximum + jnp.log(total)


def _with_gradient_from_result(forward: Callable) -> Callable:
    """Return `forward` with the gradient exp(x - result), which saves no array of exponentials."""
    # (docs/performance.md, "Log-sum-exp gradient from its result")

    @jax.custom_vjp
    def logsumexp(x: jax.Array) -> jax.Array:
        return forward(x)

    def save(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        lse = forward(x)
        return lse, (x, lse)

    def gradient(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
        x, lse = saved
        return (jnp.exp(x - lse[..., None]) * dy[..., None],)

    logsumexp.defvjp(save, gradient)
    return logsumexp


logsumexp_default = _with_gradient_from_result(logsumexp_reference)
logsumexp_gpu = _with_gradient_from_result(
    _one_pass
)  # (docs/performance.md, "One-pass log-sum-exp")
