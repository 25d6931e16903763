"""Attention against the NumPy equations: every back end, every option, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from reference import numpy_gpt as ref

from jaxgpt import attention
from jaxgpt.attention import attend, rotate
from jaxgpt.config import Config
from jaxgpt.layers import Dropout

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
CASES = [
    {},
    {"causal": False},
    {"window": 3},
    {"window": 1},
    {"kv_heads": 2},
    {"kv_heads": 1, "window": 5},
]


def inputs(dtype: str, kv_heads: int = 4, length: int = 9, width: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width) for heads in (4, kv_heads, kv_heads, 4)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def value_and_grads(run, q, k, v, weights):
    """The output of `run`, and the gradients of its sum weighted by `weights`."""
    loss = lambda q, k, v: (run(q, k, v) * weights).sum()
    return run(q, k, v), *jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def expected(q, k, v, weights, **options):
    options |= {"scale": q.shape[-1] ** -0.5}
    return ref.attention(q, k, v, **options), *ref.attention_backward(weights, q, k, v, **options)


# JAX's own softmax is float32 whatever it is given, so it cannot meet the float64 tolerance
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", "float32"),
        ("reference", "float64"),
        ("cpu", "float32"),
        ("cpu", "float64"),
        ("xla", "float32"),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_gradients_are_the_references(case, backend, dtype):
    options = {"causal": True, "window": 0} | case
    q, k, v, weights = inputs(dtype, options.pop("kv_heads", 4))
    with jax.enable_x64(dtype == "float64"):
        got = value_and_grads(lambda *x: attend(*x, backend=backend, **options), q, k, v, weights)
    for name, ours, theirs in zip("oqkv", got, expected(q, k, v, weights, **options), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[dtype], err_msg=name)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 100}], ids=str)
def test_the_tpu_kernel_interpreted_is_the_reference(options):
    options = {"causal": True, "window": 0} | options
    q, k, v, weights = inputs("float32", kv_heads=2, length=256, width=64)
    run = lambda *x: attention._splash(*x, interpret=True, scale=64**-0.5, **options)
    got = value_and_grads(run, q, k, v, weights)
    for ours, theirs in zip(got, expected(q, k, v, weights, **options), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_lengths_that_the_tpu_kernel_does_not_take_go_without_it():
    """A prompt's, when a model is sampled."""
    q, k, v, _ = inputs("float32")
    got = attend(q, k, v, causal=True, backend="splash")
    np.testing.assert_allclose(got, ref.attention(q, k, v, scale=8**-0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_half_width_inputs_keep_their_type_and_are_close_to_the_reference(backend):
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs("float32"))
    got = attend(q, k, v, causal=True, backend=backend)
    assert got.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    want = ref.attention(*wide, scale=8**-0.5)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.03)


def dropping(rate: float) -> Partial:
    drop = Dropout(rate, jax.random.split(jax.random.key(0), 2))
    return Partial(Dropout.__call__, drop, site=1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dropout_acts_on_the_weights_alone(backend):
    """With values of one, the output is the sum of the weights that are left."""
    q, k, _, _ = inputs("float32", length=64)
    how = {"causal": False, "dropout": dropping(0.25), "backend": backend}
    sums = attend(q, k, jnp.ones_like(k), **how)[..., 0]
    assert np.asarray(sums).std() > 0.01
    assert np.asarray(sums).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_gradient_by_hand_drops_what_the_equations_drop(backend):
    q, k, v, weights = inputs("float32", kv_heads=2)
    drop = dropping(0.25)

    def equations(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(8)
        probabilities = jax.nn.softmax(jnp.where(jnp.tri(9, dtype=bool), scores, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", drop(probabilities), v)

    hand = lambda *x: attend(*x, causal=True, dropout=drop, backend=backend)
    got, want = (value_and_grads(run, q, k, v, weights) for run in (hand, equations))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "positions", [[[0, 1, 2, 3, 4, 5]], [[3, 4, 9, 2, 0, 1], [5, 5, 5, 5, 5, 5]]]
)
def test_rotation_is_that_of_complex_numbers(positions):
    x = np.random.default_rng(0).standard_normal((2, 6, 3, 8)).astype(np.float32)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = np.array(positions)[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, jnp.array(positions)), want, atol=1e-5)


def test_rotated_scores_depend_on_distance_alone():
    q, k, _, _ = inputs("float32", length=6)
    at = lambda shift: jnp.arange(6)[None] + shift
    score = lambda shift: jnp.einsum("BTNH,BSNH->BNTS", rotate(q, at(shift)), rotate(k, at(shift)))
    np.testing.assert_allclose(score(0), score(100), atol=1e-4)


# ---- the module ------------------------------------------------------------------------------


def make_module(**options) -> tuple[Config, attention.Attention]:
    defaults = {"n_head": 4, "n_embd": 32, "n_layer": 2, "block_size": 8, "vocab_size": 11}
    config = Config(**defaults | {"dtype": "float32", "attention": "reference"} | options)
    return config, attention.Attention(config, rngs=nnx.Rngs(0))


def test_the_fused_map_is_separate_heads_and_concatenation():
    """One einsum over a head axis = a loop over heads with matrices of their own."""
    config, module = make_module()
    rng = np.random.default_rng(0)
    module.qkv.bias[...] = jnp.array(rng.standard_normal((3, 4, 8)), jnp.float32)
    x = rng.standard_normal((2, 8, 32)).astype(np.float32)
    fused, _, _ = module(x, None, 0, Dropout(), None, None)

    kernel, bias = np.array(module.qkv.kernel[...]), np.array(module.qkv.bias[...])
    heads = []
    for head in range(config.n_head):
        q, k, v = (x @ kernel[:, part, head] + bias[part, head] for part in range(3))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(config.head_dim)
        scores = np.where(np.tril(np.ones((8, 8))) == 1, scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        heads.append(weights @ v)
    together = np.concatenate(heads, axis=-1)
    out = np.array(module.out.kernel[...]).reshape(32, 32)
    np.testing.assert_allclose(fused, together @ out + np.array(module.out.bias[...]), atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_no_output_has_a_gradient_from_its_future_or_from_beyond_the_window(window):
    _, module = make_module(sliding_window=window)
    x = jax.random.normal(jax.random.key(0), (1, 8, 32))
    reach_TT = jax.jacobian(lambda x: module(x, None, 0, Dropout(), None, None)[0].sum((0, 2)))(x)
    reach_TT = np.abs(reach_TT).sum((1, 3))
    query, key = np.arange(8)[:, None], np.arange(8)
    allowed = (key <= query) & (key > query - (window or 8))
    np.testing.assert_array_equal(reach_TT > 0, allowed)


def test_grouped_heads_share_keys_and_values():
    """Heads of a group whose queries are equal have equal outputs; it takes fewer parameters."""
    config, module = make_module(n_kv_head=2)
    module.q.kernel[...] = jnp.repeat(module.q.kernel[...][:, ::2], 2, axis=1)
    x = jax.random.normal(jax.random.key(0), (1, 8, 32))
    q, k, v = module.project(x)
    out = np.asarray(attend(q, k, v, causal=True))
    np.testing.assert_array_equal(out[:, :, 0], out[:, :, 1])
    np.testing.assert_array_equal(out[:, :, 2], out[:, :, 3])
    assert not np.allclose(out[:, :, 0], out[:, :, 2])
    assert k.shape == v.shape == (1, 8, config.kv_heads, 8)


# ---- keys and values from another sequence ---------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "xla"},
        {"n_kv_head": 2, "position": "rope"},
        {"sliding_window": 3, "score_scale": "embedding", "qk_norm": True},
    ],
    ids=str,
)
def test_cross_attention_and_its_gradients_are_the_references(options):
    """Queries of x [B, T, D], keys and values of a source [B, S, D], S > T; nothing is hidden."""
    config = make_module(**options)[0]
    module = attention.Attention(config, cross=True, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), jnp.float32),
        nnx.to_pure_dict(state),
    )
    x, source, weights = (
        rng.standard_normal((2, length, 32)).astype(np.float32) for length in (5, 8, 5)
    )

    def run(params, x, source):
        out, _, _ = nnx.merge(graphdef, params)(
            x, None, 0, Dropout(), None, None, source_BSD=source
        )
        return (out * weights).sum(), out

    gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = gradient(params, x, source)
    want, want_grads = cross_by_reference(jax.device_get(params), x, source, weights, config)
    np.testing.assert_allclose(out, want, atol=1e-5)
    want_grads = ref.flatten(want_grads)
    for path, grad in ref.flatten(list(grads)).items():
        np.testing.assert_allclose(grad, want_grads.pop(path), atol=1e-4, err_msg=path)
    assert not want_grads


def cross_by_reference(p: dict, x, source, weights, c: Config):
    """-> the output, and the gradients of its weighted sum: [of p, of x, of the source]."""
    kv = ref.linear(source, p["kv"])
    q_raw, k_raw, v = ref.linear(x, p["q"]), kv[:, :, 0], kv[:, :, 1]
    q, k = q_raw, k_raw
    if c.qk_norm:
        q, k = ref.norm(q, p["q_norm"], "rmsnorm"), ref.norm(k, p["k_norm"], "rmsnorm")
    width = c.n_embd if c.score_scale == "embedding" else c.head_dim
    options = {"scale": width**-0.5, "causal": False}
    heads = ref.attention(q, k, v, **options)
    grads = {}
    dheads, grads["out"] = ref.linear_backward(weights, heads, p["out"], n_in=2)
    dq, dk, dv = ref.attention_backward(dheads, q, k, v, **options)
    if c.qk_norm:
        dq, grads["q_norm"] = ref.norm_backward(dq, q_raw, p["q_norm"], "rmsnorm")
        dk, grads["k_norm"] = ref.norm_backward(dk, k_raw, p["k_norm"], "rmsnorm")
    dx, grads["q"] = ref.linear_backward(dq, x, p["q"])
    dsource, grads["kv"] = ref.linear_backward(np.stack([dk, dv], axis=2), source, p["kv"])
    return ref.linear(heads, p["out"], n_in=2), [grads, dx, dsource]
