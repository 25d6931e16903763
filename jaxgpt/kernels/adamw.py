"""Adam's update direction (Kingma & Ba 2015), after optax has updated the moments.

The reference is the update that `optax.scale_by_adam` returns.
"""

from typing import Any

import jax
import jax.numpy as jnp

ADAM_EPSILON = 1e-8


def adam_direction_folded(state: Any, b1: float, b2: float) -> tuple[Any, Any]:
    """Return the direction and the state; both bias corrections are one factor.

    The formula is at the end of the paper's section 2. `state` is what `optax.scale_by_adam`
    returned (docs/performance.md, "Folded bias corrections").
    """
    root = jnp.sqrt(1 - b2**state.count)
    rate = root / (1 - b1**state.count)

    def direction(m: jax.Array, v: jax.Array) -> jax.Array:
        return rate * m / (jnp.sqrt(v) + ADAM_EPSILON * root)

    return jax.tree.map(direction, state.mu, state.nu), state


def adam_direction_cpu(state: Any, b1: float, b2: float) -> tuple[Any, Any]:
    """Compute `adam_direction_folded` after the new moments are written to memory.

    Otherwise XLA:CPU computes the moments twice, the second time in the parameter update. It also
    keeps copies of the old moments for this (docs/performance.md, "AdamW moments in memory").
    """
    return adam_direction_folded(jax.lax.optimization_barrier(state), b1, b2)
