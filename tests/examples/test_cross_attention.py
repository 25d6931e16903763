"""Test cross-attention against the NumPy equations.

B batch, T query length, S source length, D embedding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import numpy_gpt as ref

from examples.lecture.cross_attention import CrossAttention
from jaxgpt.config import Config
from jaxgpt.kernels.dropout import Dropout


def make_module(**options) -> tuple[Config, CrossAttention]:
    keys = {"n_head": 4, "n_embd": 32, "n_layer": 2, "dtype": "float32", "attention": "reference"}
    config = Config(**keys | options)
    return config, CrossAttention(config, rngs=nnx.Rngs(0))


def cross_by_reference(p: dict, x_BTD, source_BSD, weights_BTD, c: Config) -> tuple:
    """Return the output, and the gradients of its weighted sum for p, x and the source."""
    kv = ref.linear(source_BSD, p["kv"])
    q_raw, k_raw, v = ref.linear(x_BTD, p["q"]), kv[:, :, 0], kv[:, :, 1]
    q, k = q_raw, k_raw
    if c.qk_norm:
        q, k = ref.norm(q, p["q_norm"], "rmsnorm"), ref.norm(k, p["k_norm"], "rmsnorm")
    options = {"scale": c.head_dim**-0.5, "causal": False}
    heads = ref.attention(q, k, v, **options)
    grads = {}
    dheads, grads["out"] = ref.linear_backward(weights_BTD, heads, p["out"], n_in=2)
    dq, dk, dv = ref.attention_backward(dheads, q, k, v, **options)
    if c.qk_norm:
        dq, grads["q_norm"] = ref.norm_backward(dq, q_raw, p["q_norm"], "rmsnorm")
        dk, grads["k_norm"] = ref.norm_backward(dk, k_raw, p["k_norm"], "rmsnorm")
    dx, grads["q"] = ref.linear_backward(dq, x_BTD, p["q"])
    dsource, grads["kv"] = ref.linear_backward(np.stack([dk, dv], axis=2), source_BSD, p["kv"])
    return ref.linear(heads, p["out"], n_in=2), [grads, dx, dsource]


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "xla"},
        {"n_kv_head": 2, "position": "rope"},
        {"sliding_window": 3, "qk_norm": True},
    ],
    ids=str,
)
def test_cross_attention_and_gradients_match_numpy(options):
    """The source is longer than the queries, and every query sees the whole source."""
    config, module = make_module(**options)
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = jax.tree.map(lambda p: 0.3 * normal(*p.shape), nnx.to_pure_dict(state))
    x_BTD, source_BSD, weights_BTD = normal(2, 5, 32), normal(2, 8, 32), normal(2, 5, 32)

    def weighted_sum(params, x_BTD, source_BSD):
        out_BTD = nnx.merge(graphdef, params)(x_BTD, source_BSD)
        return (out_BTD * weights_BTD).sum(), out_BTD

    gradient = jax.jit(jax.value_and_grad(weighted_sum, argnums=(0, 1, 2), has_aux=True))
    (_, out_BTD), grads = gradient(jax.tree.map(jnp.asarray, params), x_BTD, source_BSD)
    want_BTD, want_grads = cross_by_reference(params, x_BTD, source_BSD, weights_BTD, config)
    np.testing.assert_allclose(out_BTD, want_BTD, atol=1e-5)
    want_grads = ref.flatten(want_grads)
    for path, grad in ref.flatten(list(grads)).items():
        np.testing.assert_allclose(grad, want_grads.pop(path), atol=1e-4, err_msg=path)
    assert not want_grads


@pytest.mark.parametrize("attention_dropout", [True, False])
def test_dropout_acts_on_the_output_and_on_weights_if_enabled(attention_dropout):
    _, module = make_module(attention_dropout=attention_dropout)
    x_BTD = jax.random.normal(jax.random.key(0), (2, 5, 32))
    keys_B = jax.random.split(jax.random.key(1), 2)
    whole = np.asarray(module(x_BTD, x_BTD))
    dropped = np.asarray(module(x_BTD, x_BTD, dropout=Dropout(0.5, keys_B)))
    assert 0.4 < (dropped == 0).mean() < 0.6
    kept = dropped != 0
    assert np.allclose(dropped[kept], 2 * whole[kept], rtol=1e-4) != attention_dropout
