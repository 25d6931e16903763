"""The Flax model against the NumPy one: values and gradients of every option."""

import jax
import numpy as np
import pytest
from flax import nnx
from reference import numpy_gpt as ref
from reference.options import DEFAULTS, MODEL_CASES

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.loss import cross_entropy

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def make_config(**options) -> Config:
    return Config(**DEFAULTS | {"dtype": "float32", "attention": "reference"} | options)


def random_case(config: Config, dtype: str = "float32", seed: int = 1):
    """Parameters of the reference, with blocks by number as in the Flax model; tokens, targets."""
    rng = np.random.default_rng(seed)
    params = ref.init_params(config, rng, np.dtype(dtype))
    params["blocks"] = dict(enumerate(params["blocks"]))
    if not params["blocks"]:
        del params["blocks"]
    tokens, targets = rng.integers(0, config.vocab_size, (2, 3, config.block_size))
    targets[0, :2] = -1
    return params, tokens, targets


def loss_and_grads(config: Config, params, tokens, targets):
    graphdef, _, _ = model.split(config)

    def loss(params):
        total, count = cross_entropy(nnx.merge(graphdef, params)(tokens), targets)
        return total / count

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", MODEL_CASES, ids=str)
def test_loss_and_gradients_are_the_references(options, dtype):
    config = make_config(**options, dtype=dtype)
    params, tokens, targets = random_case(config, dtype)
    with jax.enable_x64(dtype == "float64"):
        loss, grads = loss_and_grads(config, params, tokens, targets)
    want_loss, want_grads = ref.loss_and_grads(
        params | {"blocks": params.get("blocks", {})}, tokens, targets, config
    )
    assert loss == pytest.approx(want_loss, rel=TOLERANCE[dtype])
    want_grads = ref.flatten(want_grads)
    for path, grad in ref.flatten(grads).items():
        want = want_grads.pop(path)
        atol = TOLERANCE[dtype] * max(1, abs(want).max())
        np.testing.assert_allclose(grad, want, rtol=0, atol=atol, err_msg=path)
    assert not want_grads
