"""Norms, activations, log-sum-exp and positions against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_all_close, value_and_grads
from reference import numpy_gpt as ref

from jaxgpt.kernels.logsumexp import logsumexp_default, logsumexp_gpu, logsumexp_reference
from jaxgpt.kernels.norm import norm_cpu, norm_gpu, norm_reference
from jaxgpt.kernels.position import apply_rope, sinusoids
from jaxgpt.model import ACTIVATIONS

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
RNG = np.random.default_rng(0)


# ---- norms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("variant", [norm_reference, norm_cpu, norm_gpu])
def test_a_norm_and_its_gradients_are_numpys(variant, kind, dtype):
    x, dy = (RNG.standard_normal((2, 3, 64)).astype(dtype) for _ in range(2))
    scale = RNG.standard_normal(64).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        run = partial(variant, centered=kind == "layernorm")
        got = value_and_grads(run, (x, scale), dy)
    params = {"scale": scale}
    dx, grads = ref.norm_backward(dy, x, params, kind)
    assert_all_close(got, [ref.norm(x, params, kind), dx, grads["scale"]], TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("variant", [norm_reference, norm_cpu, norm_gpu])
def test_statistics_of_a_norm_are_float32_whatever_its_input(variant, kind):
    """A mean of 100 and a deviation of one: sums in bfloat16 would lose the deviation."""
    x = jnp.asarray(100 + RNG.standard_normal((8, 512)), jnp.bfloat16)
    y = variant(x, jnp.ones(512), centered=kind == "layernorm")
    assert y.dtype == jnp.float32
    want = ref.norm(np.asarray(x, np.float64), {"scale": 1}, kind)
    np.testing.assert_allclose(y, want, atol=0.001)


# ---- activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_gradient_are_numpys(name):
    x = np.linspace(-8, 8, 300, dtype=np.float32)
    got = value_and_grads(ACTIVATIONS[name], [x], np.ones_like(x))
    assert_all_close(got, ref.ACTIVATIONS[name](x), 1e-5)


# ---- the logarithm of a sum of exponentials --------------------------------------------------


@pytest.mark.parametrize("variant", [logsumexp_reference, logsumexp_default, logsumexp_gpu])
@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_the_logarithm_of_a_sum_is_numpys_however_large_the_numbers(variant, shift):
    """Also with numbers that are -inf; the gradient is the softmax."""
    x = 10 * RNG.standard_normal((5, 300)).astype(np.float32) + shift
    x[1, ::2], x[2, :299], x[3, 1:] = -np.inf, -np.inf, -np.inf
    x_f64 = x.astype(np.float64)
    largest = x_f64.max(-1, keepdims=True)
    sums = np.exp(x_f64 - largest).sum(-1, keepdims=True)
    got, grad = value_and_grads(jax.jit(variant), [x], np.ones(5))
    np.testing.assert_allclose(got, (np.log(sums) + largest)[:, 0], rtol=1e-6)
    softmax = np.exp(x_f64 - largest) / sums
    np.testing.assert_allclose(grad, softmax, atol=1e-5 + 1e-7 * abs(shift))


# ---- positions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions", [[[0, 1, 2, 3, 4, 5]], [[3, 4, 9, 2, 0, 1], [5, 5, 5, 5, 5, 5]]]
)
def test_rotation_is_that_of_complex_numbers(positions):
    x = RNG.standard_normal((2, 6, 3, 8)).astype(np.float32)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = np.array(positions)[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    rotated = pairs * np.exp(1j * angle)
    want = np.concatenate([rotated.real, rotated.imag], axis=-1)
    np.testing.assert_allclose(apply_rope(x, jnp.array(positions)), want, atol=1e-5)


def test_rotated_scores_depend_on_distance_alone():
    q, k = RNG.standard_normal((2, 2, 6, 4, 8)).astype(np.float32)

    def scores(shift: int) -> jax.Array:
        positions_BT = jnp.arange(6)[None] + shift
        rotated = apply_rope(q, positions_BT), apply_rope(k, positions_BT)
        return jnp.einsum("BTNH,BSNH->BNTS", *rotated)

    np.testing.assert_allclose(scores(0), scores(100), atol=1e-4)


def test_sinusoids_are_the_papers():
    got = sinusoids(jnp.array([[0, 1, 2, 3], [4, 5, 6, 7]]), 10)
    want = ref.sinusoidal_table(8, 10, np.float32).reshape(2, 4, 10)
    np.testing.assert_allclose(got, want, atol=1e-5)
