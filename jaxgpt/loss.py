"""Cross-entropy of the next token. B batch, T length, V vocabulary."""

import jax

from jaxgpt import kernels


@jax.named_scope("loss")
def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the summed cross-entropy in nats, at least float32, and the number of targets.

    A negative target, such as nanoGPT's -1, does not count.
    """
    losses_BT = kernels.token_losses(logits_BTV, targets_BT)
    return losses_BT.sum(), (targets_BT >= 0).sum()
