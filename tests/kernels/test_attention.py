"""Test values and gradients of every attention implementation and option against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_all_close, make_config, value_and_grads
from jax.sharding import NamedSharding, PartitionSpec
from reference import numpy_gpt as ref

from jaxgpt.kernels import ANY, TABLE, attention, dot_product_attention
from jaxgpt.kernels.attention import AttentionOptions
from jaxgpt.kernels.dropout import BoundDropout, Dropout, DropoutSite
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.sharding import BATCH, use_mesh

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
OWN = [  # gradients are written by hand or derived by JAX, not by a library
    attention.attention_reference,
    attention.attention_saved_weights,
    attention.attention_cpu,
]
CASES = [
    {},
    {"causal": False},
    {"window": 3},
    {"window": 1},
    {"kv_heads": 2},
    {"kv_heads": 1, "window": 5},
    {"documents": True},
    {"documents": True, "window": 3, "kv_heads": 2},
    {"documents": True, "causal": False, "kv_heads": 1},
]
name_of = lambda value: getattr(value, "__name__", str(value))
interpreted = partial(attention.attention_splash, interpret=True)


def operands(dtype: str = "float32", kv_heads: int = 4, length: int = 9, width: int = 8) -> list:
    """Return q, k, v and the weights of the output."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width) for heads in (4, kv_heads, kv_heads, 4)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def check(implementation, arrays, atol, *, causal=True, window=0, documents=False) -> None:
    """Compare output and gradients with NumPy; `documents` splits sequences into documents."""
    *qkv, weights = arrays
    length, scale = qkv[0].shape[1], qkv[0].shape[-1] ** -0.5
    segments_BT = mask_BTS = None
    if documents:
        segments_BT = np.arange(length)[None] // [[length // 3], [length // 2]]
        mask_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        segments_BT = jnp.asarray(segments_BT, jnp.int32)
    options = {"causal": causal, "window": window, "scale": scale}
    run = lambda q, k, v: implementation(q, k, v, segments_BT, None, AttentionOptions(**options))
    want = ref.attention(*qkv, **options, mask_BTS=mask_BTS)
    want_grads = ref.attention_backward(weights, *qkv, **options, mask_BTS=mask_BTS)
    assert_all_close(value_and_grads(run, qkv, weights), [want, *want_grads], atol)


# JAX's own softmax is float32 whatever its input, so it cannot meet the float64 tolerance
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(own, dtype) for own in OWN for dtype in TOLERANCE]
    + [(attention.attention_xla, "float32"), (attention.attention_flash, "float32")],
    ids=name_of,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_gradients_match_numpy(case, implementation, dtype):
    options = dict(case)
    with jax.enable_x64(dtype == "float64"):
        arrays = operands(dtype, options.pop("kv_heads", 4))
        check(implementation, arrays, TOLERANCE[dtype], **options)


def test_cudnn_call_run_by_xla_matches_numpy(monkeypatch):
    def without_cudnn(*args, implementation: str, call=jax.nn.dot_product_attention, **options):
        assert implementation == "cudnn"
        return call(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    check(attention.attention_cudnn, operands(), 1e-5, window=3)


def test_every_attention_implementation_in_the_table_is_tested():
    others = {attention.attention_xla, attention.attention_cudnn, attention.attention_splash}
    in_table = {function for (name, _), function in TABLE.items() if name.startswith("attention")}
    assert in_table == others | {*OWN, attention.attention_flash}


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 100}], ids=str)
def test_interpreted_splash_attention_and_gradients_match_numpy(options, documents):
    arrays = operands(kv_heads=2, length=256, width=64)
    check(interpreted, arrays, 1e-4, documents=documents, **options)


@pytest.mark.parametrize("documents", [False, True])
def test_splash_attention_on_a_mesh_equals_one_device(documents):
    """Each of the two devices gets the documents of its own sequences."""
    *arrays, _ = operands(length=128, width=64)
    if documents:
        arrays.append(np.array([np.arange(128) // 50, np.arange(128) // 70], np.int32))
    mesh = make_mesh(make_config(mesh="data:2"))
    options = AttentionOptions(causal=True, window=0, scale=0.125)
    run = lambda q, k, v, segments=None: interpreted(q, k, v, segments, None, options)
    placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(BATCH)))
    got = jax.jit(use_mesh(mesh)(run))(*placed)
    np.testing.assert_allclose(got, run(*map(jnp.asarray, arrays)), atol=1e-6)


@pytest.mark.parametrize("mesh", ["data:2", "tensor:2"])
def test_flash_attention_on_a_mesh_equals_one_device(mesh):
    """Each device computes the documents and the dropout masks of its own sequences and heads."""
    *arrays, _ = operands(length=40, width=16)
    arrays.append(np.array([np.arange(40) // 15, np.arange(40) // 22], np.int32))
    options = AttentionOptions(causal=True, window=0, scale=0.25)
    run = lambda *arrays: attention.attention_flash(*arrays, make_dropout(), options)
    want = run(*map(jnp.asarray, arrays))
    placed = make_mesh(make_config(mesh=mesh))
    heads = NamedSharding(placed, PartitionSpec(BATCH, None, "tensor"))
    *qkv, segments = arrays
    arrays = [*jax.device_put(qkv, heads), jnp.asarray(segments)]
    np.testing.assert_allclose(jax.jit(use_mesh(placed)(run))(*arrays), want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [127, 128, 129, 300])
@pytest.mark.parametrize("window", [0, 1, 130])
def test_flash_attention_at_the_ends_of_its_tiles_matches_numpy(length, window):
    arrays = operands(kv_heads=2, length=length, width=24)
    check(attention.attention_flash, arrays, 1e-5, documents=length == 300, window=window)


@pytest.mark.parametrize("implementation", [*OWN, attention.attention_flash], ids=name_of)
def test_bfloat16_attention_keeps_the_dtype_and_stays_close_to_numpy(implementation):
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in operands()[:3]]
    got = implementation(*qkv, None, None, AttentionOptions(True, 0, 8**-0.5))
    assert got.dtype == jnp.bfloat16
    want = ref.attention(*(np.asarray(x, np.float64) for x in qkv), scale=8**-0.5)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.03)


# ---- attention dropout -----------------------------------------------------------------------


def make_dropout(rate: float = 0.25) -> BoundDropout | None:
    dropout = Dropout(rate, jax.random.split(jax.random.key(0), 2))
    return dropout.bind(0, DropoutSite.ATTENTION_WEIGHTS)


@pytest.mark.parametrize("implementation", [*OWN, attention.attention_flash], ids=name_of)
def test_attention_dropout_and_gradients_match_the_equations(implementation):
    *qkv, weights = operands(kv_heads=2)
    dropout = make_dropout()

    def equations(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(8)
        probabilities = jax.nn.softmax(jnp.where(jnp.tri(9, dtype=bool), scores, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", dropout(probabilities), v)

    options = AttentionOptions(True, 0, 8**-0.5)
    run = lambda q, k, v: implementation(q, k, v, None, dropout, options)
    got, want = (value_and_grads(function, qkv, weights) for function in (run, equations))
    assert_all_close(got, want, atol=1e-5)


def test_a_window_without_a_causal_mask_is_refused():
    q, k, v, _ = operands()
    message = "window=5: attends to earlier keys only; expected causal=True, or window=0"
    with pytest.raises(ValueError, match=f"^{message}$"):
        dot_product_attention(q, k, v, causal=False, window=5)


# ---- choice of the implementation ------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "case", "taken"),
    [
        ("splash", {"length": 128}, "splash"),
        ("splash", {"length": 9}, "reference"),  # a prompt's, when a model is sampled
        ("splash", {"length": 128, "dropout": True}, "reference"),
        ("xla", {"length": 9, "dropout": True}, "reference"),
        ("cudnn", {"length": 9, "dropout": True}, "reference"),
        ("flash", {"length": 9, "dropout": True}, "flash"),
        ("flash", {"length": 9, "queries": 4}, "reference"),
        ("cpu", {"length": 9, "dropout": True}, "cpu"),
        ("cpu", {"length": 9, "queries": 4}, "reference"),
    ],
    ids=str,
)
def test_attention_falls_back_to_reference_for_unsupported_options(
    backend, case, taken, monkeypatch
):
    called = []
    for operation in [name for name, platform in TABLE if platform == ANY]:
        if operation.startswith("attention"):
            spy = lambda *args, name=operation: called.append((name, args[-1]))
            monkeypatch.setitem(TABLE, (operation, ANY), spy)
    q, k, v, _ = operands(length=case["length"])
    dropout = make_dropout() if case.get("dropout") else None
    q = q[:, : case.get("queries", case["length"])]
    dot_product_attention(q, k, v, causal=True, backend=backend, dropout=dropout)
    assert called == [(f"attention_{taken}", AttentionOptions(True, 0, 8**-0.5))]
