"""Cross-entropy of the next token.

B batch, T length, V vocabulary.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy in nats, and the number of targets; float32 at least.

    A negative target counts for nothing; nanoGPT's -1 is one.
    """
    wide_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    # a comparison fuses with the sum; a gather, and the scatter of its gradient, would not
    is_target = jnp.arange(wide_BTV.shape[-1]) == targets_BT[..., None]
    picked_BT = jnp.where(is_target, wide_BTV, 0).sum(-1)
    loss_BT = jax.nn.logsumexp(wide_BTV, axis=-1) - picked_BT
    counted_BT = targets_BT >= 0
    return jnp.where(counted_BT, loss_BT, 0).sum(), counted_BT.sum()
