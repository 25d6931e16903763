"""Find steps whose loss or gradient norm is far above that of the steps before them.

levanter and MaxText skip such steps in the same way. W is the number of steps that are remembered.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def no_steps(window: int) -> jax.Array:
    """Return the losses and norms of the last W steps, [2, W], before the first step."""
    return jnp.full((2, window), jnp.inf)


def is_spike(recent_2W: jax.Array, loss: jax.Array, norm: jax.Array, sigmas: float) -> jax.Array:
    """Return whether the loss or the norm exceeds the mean by `sigmas` standard deviations.

    It is False until W steps are recorded: until then the deviation is NaN, and so is the sum.
    """
    mean_2 = jnp.mean(recent_2W, axis=1)
    deviation_2 = jnp.std(recent_2W, axis=1)
    return (jnp.stack([loss, norm]) > mean_2 + sigmas * deviation_2).any()


def remember(recent_2W: jax.Array, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Replace the oldest step by this one, unless it is not finite.

    Spikes are remembered too, so that training continues if the losses stay higher.
    """
    new_21 = jnp.stack([loss, norm])[:, None].astype(recent_2W.dtype)
    is_finite = jnp.isfinite(new_21).all()
    return jnp.where(is_finite, jnp.concatenate([recent_2W[:, 1:], new_21], axis=1), recent_2W)


def to_json(recent_2W: jax.Array) -> list[list[float]]:
    """Return the losses and the norms of the steps so far, oldest first."""
    steps_2W = np.asarray(recent_2W, np.float64)
    return steps_2W[:, np.isfinite(steps_2W[0])].tolist()


def from_json(steps: Sequence[Sequence[float]], window: int) -> np.ndarray:
    """Return the last W of the steps that `to_json` gave, [2, W], in `no_steps`'s dtype."""
    recent_2W = np.array(no_steps(window))
    count = min(window, len(steps[0]))
    if count:
        recent_2W[:, -count:] = np.array(steps)[:, -count:]
    return recent_2W
