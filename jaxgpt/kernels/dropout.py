"""Dropout, and the random bits of its masks."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, register_dataclass


class DropoutSite:
    """Numbers of the places in a layer where dropout acts; each place has masks of its own."""

    EMBEDDING = 0
    ATTENTION_WEIGHTS = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3


@partial(register_dataclass, data_fields=["keys_B"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropout:
    """A dropout rate with a PRNG key per sequence (Srivastava et al. 2014).

    A sequence's masks depend on its own key only, not on how a step's sequences are split into
    micro-batches or over devices. Without keys the rate must be 0.
    """

    rate: float = 0.0
    keys_B: Any = None

    def __call__(self, x: jax.Array, layer: int | jax.Array, site: int) -> jax.Array:
        """Zero a fraction `rate` of x [B, ...] and divide the rest by 1 - rate."""
        if not self.rate:
            return x
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        keys_B = fold_in(fold_in(self.keys_B, layer), site)
        bits = jax.vmap(partial(random_bits_hashed, shape=x.shape[1:]))(keys_B)
        return jnp.where(bits >= jnp.uint32(self.rate * 2**32), x / (1 - self.rate), 0)

    def bind(self, layer: int | jax.Array, site: int) -> Partial | None:
        """Return this dropout at one site as a pytree `f(x)`, or None if the rate is 0."""
        if not self.rate:
            return None
        return Partial(Dropout.__call__, self, layer=layer, site=site)


def random_bits_hashed(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 random bits: a hash of the key and of each element's index.

    Masks need no cryptographic quality, and this hash takes a tenth of the work of JAX's generator
    Threefry (docs/performance.md, "Hashed dropout masks").
    """
    first, second = jax.random.key_data(key)
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _lowbias32(_lowbias32(index + first) ^ second)


def _lowbias32(x: jax.Array) -> jax.Array:
    """Hash each uint32 (C. Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
