"""Test linear maps against NumPy: matrix products, single rows and packed weights."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_all_close, value_and_grads

from jaxgpt.kernels import TABLE, linear
from jaxgpt.kernels.embedding import embed_cpu
from jaxgpt.kernels.linear import (
    add_bias,
    linear_cpu,
    linear_in_order,
    linear_reference,
    pack_bf16,
)

VARIANTS = [linear_reference, *(TABLE[row] for row in TABLE if row[0] == "linear_map")]
LARGE = [  # sizes that are divisible into eight parts and sizes that are not
    ("BTD,DCNH->BTCNH", [(1, 1, 96), (96, 3, 20, 60)]),
    ("BTNH,NHD->BTD", [(1, 1, 20, 60), (20, 60, 250)]),
    ("BTD,VD->BTV", [(1, 1, 100), (2777, 100)]),
    ("BTD,VD->BTV", [(1, 1, 100), (2776, 100)]),
]
SMALL = [
    ("BTD,DF->BTF", [(2, 3, 4), (4, 5)]),
    ("BTD,DCNH->BTCNH", [(2, 3, 4), (4, 3, 2, 5)]),
    ("BTNH,NHD->BTD", [(2, 3, 4, 5), (4, 5, 7)]),
    ("BTD,VD->BTV", [(2, 3, 4), (11, 4)]),
]


def operands(shapes: list[tuple]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("equation", "shapes"), SMALL + LARGE, ids=str)
def test_linear_map_and_gradients_match_numpy(equation, shapes, variant):
    x, weight = operands(shapes)
    if (equation, shapes) in LARGE:
        assert weight.nbytes > linear.GEMV_MIN_BYTES
    want = np.einsum(equation, x, weight)
    x_axes, weight_axes, axes = equation.replace("->", ",").split(",")
    wants = [
        want,
        np.einsum(f"{axes},{weight_axes}->{x_axes}", want, weight),
        np.einsum(f"{axes},{x_axes}->{weight_axes}", want, x),
    ]
    got = value_and_grads(partial(variant, equation), (x, weight), want)
    atol = 1e-5 * max(np.abs(wanted).max() for wanted in wants)
    assert_all_close(got, wants, atol)


PARTS = [TABLE[row] for row in TABLE if row[0] == "linear_parts"]


@pytest.mark.parametrize("variant", PARTS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_parts_of_a_fused_map_and_gradients_match_numpy(variant, has_bias, monkeypatch):
    monkeypatch.setattr(linear, "PARTS_MIN_SIZE", 1)
    x, weight, bias = operands([(2, 3, 4), (4, 3, 2, 5), (3, 2, 5)])
    want = np.einsum("BTD,DCNH->CBTNH", x, weight)
    wants = [
        np.einsum("CBTNH,DCNH->BTD", want, weight),
        np.einsum("CBTNH,BTD->DCNH", want, x),
        want.sum((1, 2)),
    ]
    args = (x, weight, bias) if has_bias else (x, weight)
    call = lambda x, weight, bias=None: jnp.stack(variant("BTD,DCNH->BTCNH", x, weight, bias))
    got, pull_back = jax.vjp(call, *args)
    shift = bias[:, None, None] if has_bias else 0
    assert_all_close([got, *pull_back(want)], [want + shift, *wants[: len(args)]], 1e-4)


@pytest.mark.parametrize("variant", PARTS)
def test_parts_of_a_fused_map_keep_bfloat16(variant, monkeypatch):
    monkeypatch.setattr(linear, "PARTS_MIN_SIZE", 1)
    x, weight, bias = operands([(2, 3, 64), (64, 3, 2, 5), (3, 2, 5)])
    want = np.einsum("BTD,DCNH->CBTNH", x, weight) + bias[:, None, None]
    got = variant("BTD,DCNH->BTCNH", jnp.asarray(x, jnp.bfloat16), weight, bias)
    assert {part.dtype for part in got} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(np.stack(got).astype(np.float32), want, atol=0.2)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """A CPU sums bfloat16 numbers in float32 anyway, so the program is read, too."""
    y_BTF, bias_F = jnp.zeros((2, 4096, 3), jnp.bfloat16), jnp.zeros(3)
    out_BTF, pull_back = jax.vjp(add_bias, y_BTF, bias_F)
    dy_BTF, gradient_F = pull_back(jnp.ones_like(out_BTF))
    assert (dy_BTF.dtype, gradient_F.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(gradient_F, [8192] * 3)
    assert re.search(r":f32\[3\] = reduce_sum", str(jax.make_jaxpr(pull_back)(out_BTF)))


@pytest.mark.parametrize("variant", [linear_in_order, linear_cpu])
def test_batch_of_maps_is_rejected(variant):
    with pytest.raises(ValueError, match="E is in both operands and in the output"):
        variant("ECD,EDF->ECF", jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)))


@pytest.mark.parametrize("variant", [linear_in_order, linear_cpu])
def test_sum_over_middle_axes_is_rejected(variant):
    with pytest.raises(ValueError, match="'D' must lead or end both operands"):
        variant("BTD,NDH->BTNH", jnp.ones((1, 1, 2)), jnp.ones((3, 2, 4)))


# ---- packed weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "shapes", "summed_first"),
    [
        ("BTD,DCNH->BTCNH", [(1, 1, 48), (48, 3, 2, 5)], "DCNH"),  # a sum of 24 words, 3 at a time
        ("BTD,DF->BTF", [(1, 1, 512), (512, 9)], "DF"),  # of 256 words, 16 at a time
        ("BTD,DF->BTF", [(1, 1, 16), (16, 9)], "DF"),
        ("BTNH,NHD->BTD", [(1, 1, 3, 16), (3, 16, 7)], "NHD"),
        ("BTD,VD->BTV", [(1, 1, 32), (65, 32)], "DV"),
    ],
    ids=str,
)
def test_product_with_packed_weight_matches_bfloat16_rounded_weight(
    equation, shapes, summed_first, monkeypatch
):
    monkeypatch.setattr(linear, "PACKED_MIN_BYTES", 0)
    x, weight = operands(shapes)
    rounded = weight.astype(jnp.bfloat16).astype(np.float32)
    packed = pack_bf16(equation, jnp.array(rounded))
    assert (packed.dtype, 2 * packed.nbytes) == (np.uint32, weight.nbytes)
    axes = equation.replace("->", ",").split(",")[1]
    numbers = np.concatenate(linear.unpack_bf16(packed)).ravel()
    np.testing.assert_array_equal(numbers, np.einsum(f"{axes}->{summed_first}", rounded).ravel())
    got = jax.jit(partial(linear_cpu, equation))(x, packed)
    np.testing.assert_allclose(got, np.einsum(equation, x, rounded), atol=1e-5)


@pytest.mark.parametrize(("width", "min_bytes"), [(40, 0), (48, 1 << 17)])
def test_small_or_uneven_weights_are_not_packed(width, min_bytes, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_MIN_BYTES", min_bytes)
    weight = jnp.ones((width, 8))
    assert pack_bf16("BTD,DF->BTF", weight) is weight


def test_lookup_in_a_packed_table_equals_the_original_rows(monkeypatch):
    monkeypatch.setattr(linear, "PACKED_MIN_BYTES", 0)
    table_VD = operands([(65, 32)])[0].astype(jnp.bfloat16).astype(np.float32)
    tokens_BT = np.array([[3, 64, 0], [3, 3, 7]])
    packed = pack_bf16("BTD,VD->BTV", jnp.array(table_VD))
    np.testing.assert_array_equal(embed_cpu(packed, tokens_BT), table_VD[tokens_BT])
