"""Cross-entropy of the next token. B batch, T length, V vocabulary."""

import jax
import jax.numpy as jnp

from jaxgpt import kernels


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the summed cross-entropy in nats, at least float32, and the number of targets.

    A negative target, such as nanoGPT's -1, does not count.
    """
    logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    # XLA fuses the comparison with the sum; it could not fuse a gather and its gradient's scatter
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_logit_BT = jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)
    loss_BT = kernels.log_sum_exp(logits_BTV) - target_logit_BT
    mask_BT = targets_BT >= 0
    return jnp.where(mask_BT, loss_BT, 0).sum(), mask_BT.sum()
