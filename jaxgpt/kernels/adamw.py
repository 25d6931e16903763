"""Adam's update direction (Kingma & Ba 2015), after optax has updated the moments."""

from typing import Any

import jax
import jax.numpy as jnp

ADAM_EPSILON = 1e-8


def adam_direction_reference(updates: Any, state: Any, b1: float, b2: float) -> tuple[Any, Any]:
    """Return optax's update and its new state, as they are."""
    return updates, state


def adam_direction_folded(updates: Any, state: Any, b1: float, b2: float) -> tuple[Any, Any]:
    """Fold both bias corrections into one factor, as the last lines of section 2 do."""
    root = jnp.sqrt(1 - b2**state.count)
    rate = root / (1 - b1**state.count)

    def direction(m: jax.Array, v: jax.Array) -> jax.Array:
        return rate * m / (jnp.sqrt(v) + ADAM_EPSILON * root)

    return jax.tree.map(direction, state.mu, state.nu), state


def adam_direction_cpu(updates: Any, state: Any, b1: float, b2: float) -> tuple[Any, Any]:
    """Write the new moments to memory before the update reads them.

    Else XLA:CPU recomputes the moments in the parameter update, and keeps copies of the old ones
    for it (performance.md, "AdamW's moments").
    """
    return adam_direction_folded(updates, jax.lax.optimization_barrier(state), b1, b2)
