"""The cross-entropy of each token. B batch, T length, V vocabulary."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import accum_dtype, is_split, over_batch


def token_losses_reference(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    log_sum_exp: Callable = partial(jax.nn.logsumexp, axis=-1),
) -> jax.Array:
    """Return log(sum(exp(logits))) - logits[target] in nats, [B, T], float32 at least.

    The loss of a negative target, such as nanoGPT's -1, is 0.
    """
    logits_BTV = logits_BTV.astype(accum_dtype(logits_BTV))
    # XLA fuses the comparison with the sum; it could not fuse a gather and its gradient's scatter
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_logit_BT = jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)
    return jnp.where(targets_BT >= 0, log_sum_exp(logits_BTV) - target_logit_BT, 0)


# ---- accelerators: no array of exponentials --------------------------------------------------


def token_losses_from_result(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Compute `token_losses_reference`, whose gradient needs only the logits and the result.

    The reference saves an array of exponentials for its gradient
    (docs/performance.md, "Log-sum-exp gradient from its result").
    """
    return token_losses_reference(logits_BTV, targets_BT, log_sum_exp)


@jax.custom_vjp
def log_sum_exp(x: jax.Array) -> jax.Array:
    """Return log(sum(exp(x))) over the last axis."""
    return jax.nn.logsumexp(x, axis=-1)


def _log_sum_exp_fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    lse = log_sum_exp(x)
    return lse, (x, lse)


def _log_sum_exp_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, lse = saved
    return (jnp.exp(x - lse[..., None]) * dy[..., None],)


log_sum_exp.defvjp(_log_sum_exp_fwd, _log_sum_exp_bwd)


# ---- GPU: the losses and their gradient by one kernel ----------------------------------------


def token_losses_gpu(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Compute `token_losses_reference`; under a gradient, one kernel computes both.

    The kernel reads the logits from memory once, and overwrites them by their gradient. Where the
    mesh splits the vocabulary, no device has whole rows, and `token_losses_from_result` is used
    (docs/performance.md, "Cross-entropy and its gradient in one kernel").
    """
    if is_split("tensor"):
        return token_losses_from_result(logits_BTV, targets_BT)
    return _losses_with_gradient(logits_BTV, targets_BT)


@jax.custom_vjp
def _losses_with_gradient(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return token_losses_from_result(logits_BTV, targets_BT)


def _losses_fwd(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    from jaxgpt.kernels import triton

    def run(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        V = logits_BTV.shape[-1]
        loss_R, gradient_RV = triton.cross_entropy(logits_BTV.reshape(-1, V), targets_BT.ravel())
        return loss_R.reshape(targets_BT.shape), gradient_RV.reshape(logits_BTV.shape)

    return over_batch(run)(logits_BTV, targets_BT)


def _losses_bwd(gradient_BTV: jax.Array, dy_BT: jax.Array) -> tuple[jax.Array, None]:
    # in the training step dy is 1, because the losses are summed; XLA then drops this product
    return gradient_BTV * dy_BT[..., None].astype(gradient_BTV.dtype), None


_losses_with_gradient.defvjp(_losses_fwd, _losses_bwd)
