"""Cross-entropy of the next token.

B batch, T length, V vocabulary.
"""

import jax
import jax.numpy as jnp

LEAST = -1e30  # in place of -inf, which has no difference to itself


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy in nats, and the number of targets; float32 at least.

    A negative target counts for nothing; nanoGPT's -1 is one.
    """
    wide_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    # a comparison fuses with the sum; a gather, and the scatter of its gradient, would not
    is_target = jnp.arange(wide_BTV.shape[-1]) == targets_BT[..., None]
    picked_BT = jnp.where(is_target, wide_BTV, 0).sum(-1)
    loss_BT = log_sum_exp(wide_BTV) - picked_BT
    counted_BT = targets_BT >= 0
    return jnp.where(counted_BT, loss_BT, 0).sum(), counted_BT.sum()


@jax.custom_vjp
def log_sum_exp(x: jax.Array) -> jax.Array:
    """The logarithm of the sum of exp(x) over the last axis; a GPU reads x once for it."""
    return jax.lax.platform_dependent(x, cuda=_in_one_pass, default=_in_two_passes)


def _in_two_passes(x: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(x, axis=-1)


def _in_one_pass(x: jax.Array) -> jax.Array:
    """With the largest so far, and the sum over it: Milakov & Gimelshein 2018, "Online softmax"."""

    def join(a: tuple, b: tuple) -> tuple[jax.Array, jax.Array]:
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    start = jnp.asarray(LEAST, x.dtype), jnp.zeros((), x.dtype)
    operands = jnp.maximum(x, LEAST), jnp.ones_like(x)
    largest, total = jax.lax.reduce(operands, start, join, (x.ndim - 1,))
    return largest + jnp.log(total)


def _log_sum_exp_fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    found = log_sum_exp(x)
    return found, (x, found)


def _log_sum_exp_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, found = saved
    return (jnp.exp(x - found[..., None]) * dy[..., None],)


log_sum_exp.defvjp(_log_sum_exp_fwd, _log_sum_exp_bwd)
