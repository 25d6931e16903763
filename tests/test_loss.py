"""Test cross-entropy against NumPy, with every implementation of the log-sum-exp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt as ref

from jaxgpt.kernels.platform import target_platform
from jaxgpt.loss import cross_entropy

IGNORED = -1


def make_case(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((3, 4, 11))).astype(dtype)
    targets = rng.integers(0, 11, (3, 4))
    targets[0, :3] = IGNORED
    return logits, targets


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_loss_and_gradient_match_numpy(dtype, tolerance, platform):
    logits, targets = make_case(dtype)

    def mean(logits):
        total, count = cross_entropy(logits, targets)
        return total / count

    with jax.enable_x64(dtype == "float64"), target_platform(platform):
        loss, grad = jax.value_and_grad(mean)(jnp.asarray(logits))
    want_loss, want_grad = ref.cross_entropy(logits, targets)
    assert float(loss) == pytest.approx(want_loss, rel=tolerance)
    np.testing.assert_allclose(grad, want_grad, atol=tolerance)


def test_ignored_targets_do_not_affect_loss_or_count():
    logits, targets = make_case()
    total, count = cross_entropy(logits, targets)
    assert int(count) == (targets != IGNORED).sum()
    other = np.where((targets == IGNORED)[..., None], 100.0, logits)
    assert float(cross_entropy(other, targets)[0]) == pytest.approx(float(total))
    nothing = np.full_like(targets, IGNORED)
    assert [float(x) for x in cross_entropy(logits, nothing)] == [0, 0]


def test_loss_of_bfloat16_logits_is_summed_in_float32():
    logits, targets = make_case()
    rounded = jnp.asarray(logits, jnp.bfloat16)
    total, count = cross_entropy(rounded, targets)
    assert total.dtype == jnp.float32
    want, _ = ref.cross_entropy(np.asarray(rounded, np.float64), targets)
    assert float(total) == pytest.approx(want * int(count), rel=1e-5)
