"""Computed position encodings: rotary and sinusoidal.

B batch, T length, D embedding, N heads, H head dim.
"""

import jax
import jax.numpy as jnp

from jaxgpt.kernels.platform import accum_dtype

BASE = 10_000.0


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Rotate each pair (x[i], x[i + H/2]) by an angle that grows with its position.

    Source: Su et al. 2021, in the half-split form. Angles are float32 at least; the result has x's
    dtype.
    """
    half = x_BTNH.shape[-1] // 2
    dtype = accum_dtype(x_BTNH)
    frequency = BASE ** (-jnp.arange(half) / half)
    angle = (positions_BT[..., None, None] * frequency).astype(dtype)  # [B, T, 1, H / 2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BTNH.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Return sines in even and cosines in odd columns, float32 [B, T, width].

    Source: Vaswani et al. 2017, section 3.5.
    """
    frequency = BASE ** (-(jnp.arange(width) // 2 * 2) / width)
    angle_BTD = positions_BT[..., None] * frequency
    return jnp.where(jnp.arange(width) % 2 == 0, jnp.sin(angle_BTD), jnp.cos(angle_BTD))
