"""Test values and gradients of every row of the kernels' table and of small operations."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT, assert_all_close, assert_trees_close, make_config, value_and_grads
from jax.sharding import PartitionSpec
from reference import numpy_gpt as ref

from jaxgpt.kernels import ADAM_EPSILON, TABLE
from jaxgpt.kernels.accumulate import accumulate
from jaxgpt.kernels.newton_schulz import POLYNOMIALS
from jaxgpt.kernels.position import apply_rope
from jaxgpt.model import ACTIVATIONS, Norm
from jaxgpt.runtime.mesh import make_mesh

RNG = np.random.default_rng(0)
TOKENS_BT = RNG.integers(0, 11, (3, 5))
TARGETS_BT = np.array([[3, -1, 299], [0, 17, 150]])
ELSEWHERE = {
    "linear_map",
    "linear_parts",
    *(f"attention_{b}" for b in ("cpu", "cudnn", "flash", "reference", "splash", "xla")),
}
OTHERWISE = {
    "sum_over_devices",
    "adam_direction",
    "residual_and_norm",
    "compute_dtype",
    "folds_gains",  # tests/test_train_step.py
    "max_replicas",
    "orthogonalize",
}


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def variants(operation: str) -> list:
    return [pytest.param(row, id=": ".join(row)) for row in TABLE if row[0] == operation]


# ---- values and gradients against NumPy ------------------------------------------------------


def norm(kind: str, dy, x, scale) -> list[np.ndarray]:
    dx, grads = ref.norm_backward(dy, x, {"scale": scale}, kind)
    return [ref.norm(x, {"scale": scale}, kind), dx, grads["scale"]]


def embed(dy, table) -> list[np.ndarray]:
    d_table = np.zeros_like(table)
    np.add.at(d_table, TOKENS_BT, dy)
    return [table[TOKENS_BT], d_table]


def gelu_tanh(dy, x) -> list[np.ndarray]:
    y, slope = ref.ACTIVATIONS["gelu_tanh"](x)
    return [y, dy * slope]


def add_positions(dy, x, table) -> list[np.ndarray]:
    return [x + table, dy, dy.sum(0)]


def token_losses(dy, logits) -> list[np.ndarray]:
    is_target = np.arange(logits.shape[-1]) == TARGETS_BT[..., None]
    counts = (TARGETS_BT >= 0)[..., None]
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    losses = -np.log((softmax * is_target).sum(-1) + (TARGETS_BT < 0))
    return [losses, counts * dy[..., None] * (softmax - is_target)]


CASES = [  # (operation, options, operands, NumPy function for value and gradients)
    ("normalize", {"centered": True}, [draw(2, 3, 64), draw(64)], partial(norm, "layernorm")),
    ("normalize", {"centered": False}, [draw(2, 3, 64), draw(64)], partial(norm, "rmsnorm")),
    ("embed", {"tokens_BT": TOKENS_BT}, [draw(11, 8)], embed),
    ("gelu_tanh", {}, [draw(3, 5, 300)], gelu_tanh),
    ("token_losses", {"targets_BT": TARGETS_BT}, [3 * draw(2, 3, 300)], token_losses),
    ("token_losses", {"targets_BT": TARGETS_BT}, [3 * draw(2, 3, 9000)], token_losses),
    *(("add_positions", {}, [draw(B, 5, 8), draw(5, 8)], add_positions) for B in (1, 6, 16, 48)),
]


def test_every_table_operation_is_listed_in_a_test():
    """The tests read the rows of an operation from the table, so every row is covered."""
    assert {row[0] for row in TABLE} == {case[0] for case in CASES} | ELSEWHERE | OTHERWISE


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize(
    ("row", "case"),
    [
        pytest.param(row, case, id=f"{': '.join(row)}, {i}")
        for i, case in enumerate(CASES)
        for row in TABLE
        if row[0] == case[0]
    ],
)
def test_kernel_values_and_gradients_match_numpy(row, case, dtype, atol):
    _, options, arrays, numpys = case
    arrays = [array.astype(dtype) for array in arrays]
    with jax.enable_x64(dtype == "float64"):
        run = partial(TABLE[row], **options)
        dy = draw(*jax.eval_shape(run, *arrays).shape).astype(dtype)
        got = value_and_grads(run, arrays, dy)
    assert {array.dtype for array in got} == {np.dtype(dtype)}
    assert_all_close(got, numpys(dy, *arrays), atol)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("row", variants("normalize"))
def test_norm_statistics_of_bfloat16_input_are_float32(row, kind):
    """The mean is 100 and the deviation is 1; sums in bfloat16 would lose the deviation."""
    x = jnp.asarray(100 + draw(8, 512), jnp.bfloat16)
    y = TABLE[row](x, jnp.ones(512), centered=kind == "layernorm")
    assert y.dtype == jnp.float32
    want = ref.norm(np.asarray(x, np.float64), {"scale": 1}, kind)
    np.testing.assert_allclose(y, want, atol=0.001)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_gradient_match_numpy(name):
    x = np.linspace(-8, 8, 300, dtype=np.float32)
    got = value_and_grads(ACTIVATIONS[name], [x], np.ones_like(x))
    assert_all_close(got, ref.ACTIVATIONS[name](x), 1e-5)


@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("row", variants("residual_and_norm"))
def test_branch_returns_its_input_and_the_norm(row, kind, width):
    layer = Norm(kind, width, gain=False)
    run = lambda x: jnp.stack(TABLE[row](x, layer))
    x, dy = draw(3, 5, width), draw(2, 3, 5, width)
    value, dx, _ = norm(kind, dy[1], x, np.ones(width, np.float32))
    assert_all_close(value_and_grads(run, [x], dy), [np.stack([x, value]), dy[0] + dx], 1e-5)


@pytest.mark.parametrize("row", variants("token_losses"))
@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_token_losses_and_gradient_match_numpy_for_extreme_values(row, shift):
    """Some logits are -inf; the target is the largest."""
    x = 10 * draw(5, 300) + np.float32(shift)
    x[1, ::2], x[2, :299], x[3, 1:] = -np.inf, -np.inf, -np.inf
    x_f64 = x.astype(np.float64)
    largest = x_f64.max(-1, keepdims=True)
    sums = np.exp(x_f64 - largest).sum(-1, keepdims=True)
    target = x.argmax(-1)
    run = lambda x: TABLE[row](x[None], target[None])[0]
    got, grad = value_and_grads(run, [x], np.ones(5, np.float32))
    is_target = np.arange(300) == target[:, None]
    want = np.exp(x_f64 - largest) / sums - is_target
    np.testing.assert_allclose(got, np.log(sums)[:, 0], atol=2e-3 if shift else 1e-5)
    np.testing.assert_allclose(grad, want, atol=2e-3 if shift else 1e-5)


@pytest.mark.parametrize("positions", [[[0, 1, 2, 3]], [[3, 9, 2, 0], [5, 5, 5, 5]]])
def test_rope_equals_complex_rotation(positions):
    x = draw(2, 4, 3, 8)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = np.array(positions)[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    rotated = pairs * np.exp(1j * angle)
    want = np.concatenate([rotated.real, rotated.imag], axis=-1)
    np.testing.assert_allclose(apply_rope(x, jnp.array(positions)), want, atol=1e-5)


# ---- parts of the training step without gradients --------------------------------------------


@pytest.mark.parametrize("splits", [None, {"a": PartitionSpec("data"), "b": PartitionSpec()}])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("row", variants("sum_over_devices"))
def test_accumulated_loss_and_gradients_sum_over_all_sequences(row, micro, splits):
    """The mesh has two CPU devices; bfloat16 gradients are summed in float32.

    With `splits` each device gets half of the sum of `a`.
    """
    windows_GT = jnp.asarray(draw(8, 4))
    params = {"a": jnp.asarray(draw(4)), "b": jnp.asarray(draw(2), jnp.bfloat16)}
    mesh = make_mesh(make_config(mesh="data:2", batch_size=8))

    def grad_fn(params: dict, windows_BT: jax.Array, keys_B: jax.Array) -> tuple:
        grads = {"a": windows_BT.sum(0) * params["a"], "b": params["b"] * keys_B.sum()}
        return (windows_BT.sum(), jnp.int32(len(windows_BT))), grads

    windows_MBT = windows_GT.reshape(micro, -1, 4)
    keys_MB = jnp.arange(8.0, dtype=jnp.bfloat16).reshape(micro, -1)
    step = jax.jit(TABLE[row](mesh, splits)(partial(accumulate, grad_fn)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        (total, count), grads = step(params, windows_MBT, keys_MB)
    for name, size in {"a": 4, "b": 2}.items():
        shard = grads[name].addressable_shards[0].data.shape
        assert shard == ((size // 2,) if splits and splits[name] else (size,))
    assert (float(total), int(count)) == (pytest.approx(float(windows_GT.sum()), rel=1e-5), 8)
    assert {grad.dtype for grad in grads.values()} == {np.dtype("float32")}
    np.testing.assert_allclose(grads["a"], windows_GT.sum(0) * params["a"], atol=1e-5)
    np.testing.assert_allclose(grads["b"], 28 * params["b"].astype(jnp.float32), rtol=0.01)


@pytest.mark.parametrize("row", variants("adam_direction"))
def test_adam_direction_matches_optax_and_keeps_the_moments(row):
    params = {"a": draw(4, 5), "b": draw(3)}
    optimizer = optax.scale_by_adam(0.8, 0.9, eps=ADAM_EPSILON)
    state = optimizer.init(params)
    for _ in range(3):
        grads = {name: draw(*p.shape) for name, p in params.items()}
        want, state = optimizer.update(grads, state)
        got, same = TABLE[row](state, 0.8, 0.9)
        assert_trees_close(got, want, atol=1e-5)
        assert jax.tree.all(jax.tree.map(np.array_equal, same, state))


def test_the_design_page_has_a_row_for_every_operation():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert {operation for operation, _ in TABLE} <= set(listed)


# ---- orthogonal matrices ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 24, 24), (3, 16, 48), (1, 1, 7)], ids=str)
@pytest.mark.parametrize("polynomial", POLYNOMIALS)
@pytest.mark.parametrize("row", variants("orthogonalize"))
def test_orthogonalize_keeps_singular_vectors_and_brings_values_near_1(row, polynomial, shape):
    """In float32 the result applies the polynomials to each singular value.

    The polynomials amplify the rounding of bfloat16, so there the values are only near 1.
    """
    rule = POLYNOMIALS[polynomial]
    random = np.random.default_rng(0).standard_normal(shape)
    u, s, vt = np.linalg.svd(random, full_matrices=False)
    s = np.broadcast_to(np.linspace(0.3, 1, s.shape[-1]), s.shape)
    x = ((u * s[:, None]) @ vt).astype(np.float32)
    s = s / (rule.safety_factor * np.linalg.norm(s, axis=-1, keepdims=True))
    for a, b, c in rule.coefficients:
        s = a * s + b * s**3 + c * s**5
    got = TABLE[row](x, polynomial=rule)
    assert got.dtype == jnp.float32
    values = u.mT @ np.asarray(got, np.float64) @ vt.mT  # singular values, if the vectors are kept
    if TABLE[row].__name__ == "orthogonalize_bfloat16":
        diagonal = np.eye(s.shape[-1])
        np.testing.assert_allclose(values * (1 - diagonal), 0, atol=0.1)
        np.testing.assert_allclose(np.diagonal(values, axis1=1, axis2=2), 1, atol=0.7)
    else:
        np.testing.assert_allclose(got, (u * s[:, None]) @ vt, atol=2e-4)


@pytest.mark.parametrize("polynomial", POLYNOMIALS)
@pytest.mark.parametrize("row", variants("orthogonalize"))
def test_orthogonalize_divides_by_the_norm_and_the_safety_factor_once(row, polynomial):
    """One polynomial, 2 X, shows by what a matrix was divided."""
    rule = POLYNOMIALS[polynomial]._replace(coefficients=((2.0, 0.0, 0.0),))
    x = draw(2, 8, 24)
    want = 2 * x / (rule.safety_factor * np.linalg.norm(x, axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(TABLE[row](x, polynomial=rule), want, rtol=0.005)


@pytest.mark.parametrize("row", variants("orthogonalize"))
def test_orthogonalize_of_zeros_is_zero(row):
    got = TABLE[row](np.zeros((2, 3, 4), np.float32), polynomial=POLYNOMIALS["jordan"])
    np.testing.assert_array_equal(got, np.zeros((2, 3, 4)))
