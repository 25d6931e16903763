"""Dropout, and the random bits of its masks."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass


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
        dropout = self.bind(layer, site)
        return x if dropout is None else dropout(x)

    def bind(self, layer: int | jax.Array, site: int) -> "BoundDropout | None":
        """Return the dropout of one site, or None if the rate is 0."""
        if not self.rate:
            return None
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        keys_B = fold_in(fold_in(self.keys_B, layer), site)
        return BoundDropout(self.rate, jax.vmap(jax.random.key_data)(keys_B))


@partial(register_dataclass, data_fields=["seeds_B2"], meta_fields=["rate"])
@dataclass(frozen=True)
class BoundDropout:
    """Dropout of one site, with two uint32 seeds per sequence; linear, and a pytree."""

    rate: float
    seeds_B2: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Zero a fraction `rate` of x [B, ...] and divide the rest by 1 - rate."""
        shape = x.shape[1:]
        index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
        keep = jax.vmap(lambda seeds: keep_mask(self.rate, seeds[0], seeds[1], index))
        return jnp.where(keep(self.seeds_B2), x / (1 - self.rate), 0)


def keep_mask(rate: float, seed_0: jax.Array, seed_1: jax.Array, index: jax.Array) -> jax.Array:
    """Return which elements of a sequence dropout keeps: a hash of two seeds and the index.

    Masks need no cryptographic quality, and this hash takes a tenth of the work of JAX's generator
    Threefry (docs/performance.md, "Hashed dropout masks").
    """
    bits = _lowbias32(_lowbias32(index + seed_0) ^ seed_1)
    return bits >= jnp.uint32(rate * 2**32)


def _lowbias32(x: jax.Array) -> jax.Array:
    """Hash each uint32 (C. Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
