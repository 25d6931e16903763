"""Every row of the table against its operation's reference: values, and gradients."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_all_close, assert_trees_close

from jaxgpt import kernels
from jaxgpt.config import Config
from jaxgpt.kernels import TABLE, accumulate, activation, adamw, attention, embedding, linear
from jaxgpt.kernels import logsumexp, norm
from jaxgpt.kernels.attention import AttentionOptions
from jaxgpt.sharding import make_mesh

RNG = np.random.default_rng(0)
SEGMENTS_BT = jnp.asarray(RNG.integers(0, 3, (2, 128)).cumsum(axis=1) // 40)
TOKENS_BT = RNG.integers(0, 11, (3, 5))


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def attend(variant: Callable, q, k, v) -> jax.Array:
    options = AttentionOptions(causal=True, window=40, scale=0.1)
    if variant is attention.attention_splash:
        variant = partial(variant, interpret=True)
    return variant(q, k, v, SEGMENTS_BT, None, options)


QKV = [draw(2, 128, heads, 64) for heads in (2, 1, 1)]

# operation -> its reference, how one of its implementations is called, and with which arrays
OPERATIONS: dict[str, tuple[Callable, Callable, list[jax.Array]]] = {
    "add_positions": (
        embedding.add_positions_reference,
        lambda variant, x, table: variant(x, table),
        [draw(48, 5, 8), draw(5, 8)],
    ),
    "embed": (
        embedding.embed_reference,
        lambda variant, table: variant(table, TOKENS_BT),
        [draw(11, 8)],
    ),
    "gelu_tanh": (activation.gelu_tanh_reference, lambda variant, x: variant(x), [draw(300)]),
    "linear": (
        linear.linear_reference,
        lambda variant, x, weight: variant("BTNH,NHD->BTD", x, weight),
        [draw(2, 3, 4, 5), draw(4, 5, 7)],
    ),
    "logsumexp": (logsumexp.logsumexp_reference, lambda variant, x: variant(x), [draw(3, 70)]),
    "norm": (
        norm.norm_reference,
        lambda variant, x, scale: variant(x, scale, centered=True),
        [draw(2, 3, 64), draw(64)],
    ),
} | {
    f"attention {backend}": (attention.attention_reference, attend, QKV)
    for backend in ("cpu", "cudnn", "reference", "splash", "xla")
}  # fmt: skip
NOT_DIFFERENTIATED = {"accumulate", "adam_direction"}


def test_every_operation_of_the_table_is_compared():
    assert {operation for operation, _ in TABLE} == OPERATIONS.keys() | NOT_DIFFERENTIATED


@pytest.mark.parametrize("row", [row for row in TABLE if row[0] in OPERATIONS], ids=", for ".join)
def test_values_and_gradients_are_the_references(row, monkeypatch):
    if row[0] == "attention cudnn":  # as XLA computes what cuDNN is asked for
        monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    reference, call, arrays = OPERATIONS[row[0]]
    want, want_pull = jax.vjp(partial(call, reference), *arrays)
    got, pull = jax.vjp(partial(call, TABLE[row]), *arrays)
    weights = draw(*want.shape)
    assert got.dtype == want.dtype
    assert_all_close([got, *pull(weights)], [want, *want_pull(weights)], atol=1e-4)


def without_cudnn(*args, implementation: str, call=jax.nn.dot_product_attention, **options):
    assert implementation == "cudnn"
    return call(*args, implementation="xla", **options)


@pytest.mark.parametrize("platform", [kernels.ANY, "cpu"])
@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_is_the_sum_of_all_sequences(platform, micro):
    """On a mesh of a CPU's devices, too, where half-width gradients are summed in float32."""
    windows_GT, params = draw(8, 3), {"a": draw(3), "b": draw(2).astype(jnp.bfloat16)}
    mesh = make_mesh(Config(mesh="data:2", gradient_accumulation_steps=8, batch_size=1))

    def grad_fn(params: dict, windows_BT: jax.Array, keys_B: jax.Array) -> tuple:
        grads = {"a": windows_BT.sum(0) * params["a"], "b": params["b"] * keys_B.sum()}
        return (windows_BT.sum(), jnp.int32(len(windows_BT))), grads

    variant = TABLE["accumulate", platform]
    windows_MBT = windows_GT.reshape(micro, -1, 3)
    keys_MB = jnp.arange(8.0, dtype=jnp.bfloat16).reshape(micro, -1)
    step = jax.jit(lambda params, *batch: variant(grad_fn, params, *batch, mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        (total, count), grads = step(params, windows_MBT, keys_MB)
    assert (float(total), int(count)) == (pytest.approx(float(windows_GT.sum()), rel=1e-5), 8)
    assert {grad.dtype for grad in grads.values()} == {np.dtype("float32")}
    want = {"a": windows_GT.sum(0) * params["a"], "b": 28 * params["b"].astype(jnp.float32)}
    np.testing.assert_allclose(grads["a"], want["a"], atol=1e-5)
    np.testing.assert_allclose(grads["b"], want["b"], rtol=0.01)


def test_one_micro_batch_needs_no_scan_and_is_widened():
    one = accumulate.to_float32({"a": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)})
    assert [one["a"].dtype, one["n"].dtype] == ["float32", "int32"]


@pytest.mark.parametrize("platform", [kernels.ANY, "cpu"])
def test_adams_direction_and_moments_are_optaxs(platform):
    params = {"a": draw(4, 5), "b": draw(3)}
    optimizer = optax.scale_by_adam(0.8, 0.9, eps=kernels.ADAM_EPSILON)
    state = optimizer.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda p: draw(*p.shape), params)
        want, state = optimizer.update(grads, state)
        got, same = TABLE["adam_direction", platform](want, state, 0.8, 0.9)
        assert_trees_close(got, want, atol=1e-5)
        assert jax.tree.all(jax.tree.map(np.array_equal, same, state))
    assert adamw.ADAM_EPSILON == 1e-8


@pytest.mark.parametrize("batch", [1, 6, 16, 48])
def test_positions_are_added_in_groups_of_any_batch(batch):
    x_BTD, table_TD = draw(batch, 5, 8), draw(5, 8)
    got, pull = jax.vjp(embedding.add_positions_gpu, x_BTD, table_TD)
    np.testing.assert_array_equal(got, x_BTD + table_TD)
    assert_all_close(pull(x_BTD), [x_BTD, x_BTD.sum(0)], atol=1e-5)
