"""Dropout, and the random bits of its masks."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass


class DropoutSite:
    """Where dropout acts in a layer; each site has masks of its own."""

    EMBEDDING = 0
    ATTENTION_WEIGHTS = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3


@partial(register_dataclass, data_fields=["keys_B"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropout:
    """Zero a fraction `rate` of an array and scale up the rest (Srivastava et al. 2014).

    Every sequence has a key of its own, so that its masks do not depend on how a step's sequences
    are split into micro-batches or over devices.
    """

    rate: float = 0.0
    keys_B: Any = None

    def __call__(self, x: jax.Array, layer: int | jax.Array, site: int) -> jax.Array:
        if not self.rate:
            return x
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        keys_B = fold_in(fold_in(self.keys_B, layer), site)
        bits = jax.vmap(partial(random_bits_hashed, shape=x.shape[1:]))(keys_B)
        return jnp.where(bits >= jnp.uint32(self.rate * 2**32), x / (1 - self.rate), 0)


def random_bits_reference(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 bits by JAX's own generator, Threefry (Salmon et al. 2011)."""
    return jax.random.bits(key, shape, jnp.uint32)


def random_bits_hashed(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 bits by hashing the element's index and the key: a tenth of Threefry's work.

    Masks need not be cryptographic (performance.md, "Dropout masks").
    """
    first, second = jax.random.key_data(key)
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _lowbias32(_lowbias32(index + first) ^ second)


def _lowbias32(x: jax.Array) -> jax.Array:
    """Hash 32 bits (C. Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
