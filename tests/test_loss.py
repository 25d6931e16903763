"""Cross-entropy against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt as ref

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
