"""Dropout, linear maps and norms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import layers
from jaxgpt.config import Config
from jaxgpt.layers import Dropout, Linear, Norm, contract, pack, unpack


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate):
    x = jnp.ones((4, 200, 300))
    y = np.asarray(Dropout(rate, keys(4))(x, 0))
    assert (y == 0).mean() == pytest.approx(rate, abs=0.005)
    assert y[y != 0] == pytest.approx(1 / (1 - rate), rel=1e-3)
    assert y.mean() == pytest.approx(1, abs=0.02)


def test_a_sequence_keeps_its_mask_whatever_the_batch():
    x = jnp.ones((4, 16, 8))
    together = Dropout(0.5, keys(4)).layer(3)(x, 1)
    alone = Dropout(0.5, keys(4)[2:3]).layer(3)(x[2:3], 1)
    np.testing.assert_array_equal(together[2:3], alone)


def test_masks_differ_by_sequence_site_and_layer():
    x, drop = jnp.ones((2, 64, 64)), Dropout(0.5, keys(2))
    masks = [drop.layer(0)(x, 0)[0], drop.layer(0)(x, 0)[1]]
    masks += [drop.layer(0)(x, 1)[0], drop.layer(1)(x, 0)[0]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert np.mean(np.asarray(a) == np.asarray(b)) == pytest.approx(0.5, abs=0.05)


def test_no_dropout_is_the_identity():
    x = jnp.ones((2, 3))
    assert Dropout()(x, 0) is x


@pytest.mark.parametrize(
    ("equation", "shape", "want_bias"),
    [("BTD,DF->BTF", (4, 6), (6,)), ("BTD,DCNH->BTCNH", (4, 3, 2, 5), (3, 2, 5))],
)
def test_a_linear_map_is_a_matrix_product_and_a_bias(equation, shape, want_bias):
    rng = np.random.default_rng(0)
    module = Linear(equation, *shape, bias=True, rngs=nnx.Rngs(0))
    assert module.bias[...].shape == want_bias
    module.bias[...] = jnp.array(rng.standard_normal(want_bias), jnp.float32)
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    want = x @ np.array(module.kernel[...]).reshape(4, -1) + np.array(module.bias[...]).ravel()
    np.testing.assert_allclose(module(x).reshape(2, 3, -1), want, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("BTD,DCNH->BTCNH", [(1, 1, 96), (96, 3, 20, 60)]),
        ("BTNH,NHD->BTD", [(1, 1, 20, 60), (20, 60, 250)]),
        ("BTD,VD->BTV", [(1, 1, 100), (2777, 100)]),
        ("BTD,VD->BTV", [(1, 1, 100), (2776, 100)]),
    ],
    ids=str,
)
def test_one_row_by_the_parts_of_a_large_kernel_is_the_whole_product(equation, shapes):
    """Sizes that eight parts divide and ones that they do not; both gradients too."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    assert kernel.nbytes > layers.CACHED
    want = np.einsum(equation, x, kernel)
    np.testing.assert_allclose(contract(equation, x, kernel), want, atol=1e-4)
    _, pull = jax.vjp(partial(contract, equation), x, kernel)
    x_axes, kernel_axes, axes = equation.replace("->", ",").split(",")
    wants = (
        np.einsum(f"{axes},{kernel_axes}->{x_axes}", want, kernel),
        np.einsum(f"{axes},{x_axes}->{kernel_axes}", want, x),
    )
    for grad, wanted in zip(pull(jnp.array(want)), wants, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-2)


def test_a_sum_over_axes_in_the_middle_is_refused():
    with pytest.raises(ValueError, match="'D' must lead or end both operands"):
        contract("BTD,NDH->BTNH", jnp.ones((1, 1, 2)), jnp.ones((3, 2, 4)))


@pytest.mark.parametrize(
    ("equation", "shapes", "turned"),
    [
        ("BTD,DCNH->BTCNH", [(1, 1, 48), (48, 3, 2, 5)], "DCNH"),  # a sum of 24 words, 3 at a time
        ("BTD,DF->BTF", [(1, 1, 512), (512, 9)], "DF"),  # of 256 words, 16 at a time
        ("BTD,DF->BTF", [(1, 1, 16), (16, 9)], "DF"),
        ("BTNH,NHD->BTD", [(1, 1, 3, 16), (3, 16, 7)], "NHD"),
        ("BTD,VD->BTV", [(1, 1, 32), (65, 32)], "DV"),
    ],
    ids=str,
)
def test_one_row_by_a_packed_kernel_is_the_product_of_its_numbers(
    equation, shapes, turned, monkeypatch
):
    monkeypatch.setattr(layers, "PACKED", 0)
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    narrow = kernel.astype(jnp.bfloat16).astype(np.float32)
    packed = pack(equation, jnp.array(narrow))
    assert (packed.dtype, 2 * packed.nbytes) == (np.uint32, kernel.nbytes)
    _, axes, _ = equation.replace("->", ",").split(",")
    numbers = np.concatenate(unpack(packed)).ravel()
    np.testing.assert_array_equal(numbers, np.einsum(f"{axes}->{turned}", narrow).ravel())
    got = jax.jit(partial(contract, equation))(x, packed)
    np.testing.assert_allclose(got, np.einsum(equation, x, narrow), atol=1e-5)


@pytest.mark.parametrize(("width", "least"), [(40, 0), (48, 1 << 17)])
def test_a_kernel_that_is_small_or_uneven_stays_as_it_is(width, least, monkeypatch):
    monkeypatch.setattr(layers, "PACKED", least)
    kernel = jnp.ones((width, 8))
    assert pack("BTD,DF->BTF", kernel) is kernel


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_statistics_of_a_norm_are_float32_whatever_its_input(kind):
    """A mean of 100 and a deviation of one: sums in bfloat16 would lose the deviation."""
    norm = Norm(Config(), 512, kind=kind)
    x = jnp.asarray(100 + jax.random.normal(jax.random.key(0), (8, 512)), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    centre = wide.mean(-1, keepdims=True) if kind == "layernorm" else 0
    want = (wide - centre) / np.sqrt(np.square(wide - centre).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=0.02)
