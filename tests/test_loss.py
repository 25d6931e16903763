"""Cross-entropy against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt as ref

from jaxgpt import loss
from jaxgpt.loss import cross_entropy

IGNORED = -1


def case(dtype="float32"):
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((3, 4, 11))).astype(dtype)
    targets = rng.integers(0, 11, (3, 4))
    targets[0, :3] = IGNORED
    return logits, targets


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_loss_and_gradient_are_the_references(dtype, tolerance):
    logits, targets = case(dtype)
    with jax.enable_x64(dtype == "float64"):
        mean = lambda logits: (lambda total, count: total / count)(*cross_entropy(logits, targets))
        loss, grad = jax.value_and_grad(mean)(logits)
    want_loss, want_grad = ref.cross_entropy(logits, targets)
    assert float(loss) == pytest.approx(want_loss, rel=tolerance)
    np.testing.assert_allclose(grad, want_grad, atol=tolerance)


def test_ignored_targets_count_for_nothing():
    logits, targets = case()
    total, count = cross_entropy(logits, targets)
    assert int(count) == (targets != IGNORED).sum()
    other = np.where((targets == IGNORED)[..., None], 100.0, logits)
    assert float(cross_entropy(other, targets)[0]) == pytest.approx(float(total))
    nothing = np.full_like(targets, IGNORED)
    assert [float(x) for x in cross_entropy(logits, nothing)] == [0, 0]


def test_masked_logits_have_no_gradient():
    logits, targets = case()
    logits = np.concatenate([logits, np.full((3, 4, 5), -np.inf, np.float32)], axis=-1)
    grad = jax.grad(lambda logits: cross_entropy(logits, targets)[0])(logits)
    assert np.isfinite(grad).all()
    assert np.all(np.asarray(grad)[..., 11:] == 0)


def test_the_sum_is_float32_for_half_width_logits():
    logits, targets = case()
    total, _ = cross_entropy(jnp.asarray(logits, jnp.bfloat16), targets)
    assert total.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    want, _ = ref.cross_entropy(rounded, targets)
    assert float(total) == pytest.approx(want * (targets != IGNORED).sum(), rel=1e-5)


@pytest.mark.parametrize("function", [loss.log_sum_exp, loss._in_one_pass])
@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_the_logarithm_of_a_sum_is_numpys_however_large_the_numbers(function, shift):
    """Also as a GPU takes it, in one pass, and with some that are -inf."""
    x = 10 * np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32) + shift
    x[1, ::2], x[2, :299], x[3, 1:] = -np.inf, -np.inf, -np.inf
    wide = x.astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    want = np.log(np.exp(wide - largest).sum(-1)) + largest[:, 0]
    np.testing.assert_allclose(jax.jit(function)(x), want, rtol=1e-6)
