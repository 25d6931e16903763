"""Test the rate and the masks of dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.kernels.dropout import Dropout


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_the_given_rate_and_keeps_the_mean(rate):
    y = np.asarray(Dropout(rate, keys(4))(jnp.ones((4, 200, 300)), 0, 0))
    assert (y == 0).mean() == pytest.approx(rate, abs=0.005)
    assert y[y != 0] == pytest.approx(1 / (1 - rate), rel=1e-3)
    assert y.mean() == pytest.approx(1, abs=0.02)


def test_dropout_mask_of_a_sequence_does_not_depend_on_the_batch():
    x = jnp.ones((4, 16, 8))
    together = Dropout(0.5, keys(4))(x, 3, 1)
    alone = Dropout(0.5, keys(4)[2:3])(x[2:3], 3, 1)
    np.testing.assert_array_equal(together[2:3], alone)


def test_dropout_masks_differ_by_sequence_site_and_layer():
    x, dropout = jnp.ones((2, 64, 64)), Dropout(0.5, keys(2))
    masks = [*dropout(x, 0, 0), dropout(x, 0, 1)[0], dropout(x, 1, 0)[0]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert np.mean(np.asarray(a) == np.asarray(b)) == pytest.approx(0.5, abs=0.05)


def test_dropout_without_a_rate_is_the_identity():
    x = jnp.ones((2, 3))
    assert Dropout()(x, 0, 0) is x
