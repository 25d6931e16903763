"""Test what a GPU computes: attention, kernels, sampling, training and resuming.

`pytest -m gpu` runs these tests on a GPU. Plain `pytest` runs them on the CPU, with the GPU's rows
of the kernels' table, so that the tests and the rows stay correct without a card.
"""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CHILD_ENV,
    make_config,
    make_data,
    make_windows,
    random_params,
    reference_config,
    state_of,
    tiny_run,
    value_and_grads,
)
from reference import numpy_gpt as ref

from jaxgpt.config import Config
from jaxgpt.kernels import ANY, TABLE, attention, linear
from jaxgpt.kernels.attention import AttentionOptions
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.model import Norm
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.sample import NO_TOKEN, Sampler, SamplingParams
from jaxgpt.train_step import init_state, make_train_step

GPU_ROWS = [operation for operation, platform in TABLE if platform == "gpu"]
CPU_ROWS = {(name, "cpu"): TABLE.get((name, "cpu"), TABLE[name, ANY]) for name, _ in TABLE}
# Largest difference, as a fraction of the largest number: of the output, and of gradients.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (0.02, 0.05)}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def platform(request, monkeypatch) -> str:
    """Return the platform of the default device; a CPU gets the GPU's rows of the table."""
    if request.param == "gpu":
        backend = jax.default_backend()
        if backend != "gpu":
            pytest.skip(f"needs an NVIDIA GPU that JAX can use; this JAX computes on a {backend}")
    else:
        for operation, _ in list(TABLE):
            row = TABLE.get((operation, "gpu"), TABLE[operation, ANY])
            monkeypatch.setitem(TABLE, (operation, "cpu"), row)
    return request.param


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(dtype: str):
    """Return a context in which float32 products have no TF32 operands."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def check(run, arrays: list, wanted: list, dtype: str) -> None:
    """Compare the output and the gradients of `run`; the last array weights the output."""
    *operands, weights = (jnp.asarray(array, dtype) for array in arrays)
    with exact(dtype):
        got = value_and_grads(run, operands, weights)
    output, gradients = TOLERANCE[dtype]
    for i, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        theirs = np.asarray(theirs, np.float64)
        atol = (gradients if i else output) * np.abs(theirs).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs, rtol=0, atol=atol, err_msg=f"array {i}"
        )


def rounded(arrays: list, dtype: str) -> list[np.ndarray]:
    """Return the arrays after rounding to a dtype, in float64."""
    return [np.asarray(jnp.asarray(array, dtype), np.float64) for array in arrays]


# ---- attention -------------------------------------------------------------------------------

IMPLEMENTATIONS = {
    "reference": TABLE["attention_reference", ANY],
    "saved weights": TABLE["attention_reference", "gpu"],
    "xla": TABLE["attention_xla", ANY],
    "cudnn": TABLE["attention_cudnn", ANY],
    "flash": TABLE["attention_flash", ANY],
}
CASES = [
    {},
    {"causal": False},
    {"window": 40},
    {"kv_heads": 1},
    {"documents": True},
    {"documents": True, "window": 40, "kv_heads": 2},
]
SUPPORTED = [
    (name, dtype, case)
    for name, dtype, case in product(IMPLEMENTATIONS, TOLERANCE, CASES)
    if name != "cudnn" or (dtype == "bfloat16" and "documents" not in case)
]
ON_CPU = [run for run in SUPPORTED if run[0] != "cudnn" and run[1:] == ("bfloat16", CASES[-1])]
RUNS = [pytest.param("cpu", *run) for run in ON_CPU]
RUNS += [pytest.param("gpu", *run, marks=pytest.mark.gpu) for run in SUPPORTED]


def attention_operands(kv_heads: int = 4) -> list[np.ndarray]:
    """Return q, k, v and the weights of the output, of 128 tokens and heads of 64."""
    all_heads = 4, kv_heads, kv_heads, 4
    return [draw(2, 128, heads, 64, seed=seed) for seed, heads in enumerate(all_heads)]


def documents_of(length: int) -> np.ndarray:
    """Return segment ids of two sequences, which break at different tokens."""
    return np.arange(length)[None] // [[length // 3], [length // 2]]


@pytest.mark.parametrize(
    ("platform", "name", "dtype", "case"), RUNS, indirect=["platform"], ids=str
)
def test_attention_and_gradients_match_numpy(platform, name, dtype, case):
    arrays = attention_operands(case.get("kv_heads", 4))
    options = {"causal": case.get("causal", True), "window": case.get("window", 0), "scale": 0.125}
    segments_BT = mask_BTS = None
    if "documents" in case:
        segments_BT = documents_of(128)
        mask_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        segments_BT = jnp.asarray(segments_BT, jnp.int32)
    *qkv, weights = rounded(arrays, dtype)
    want = ref.attention(*qkv, **options, mask_BTS=mask_BTS)
    grads = ref.attention_backward(weights, *qkv, **options, mask_BTS=mask_BTS)
    attend = IMPLEMENTATIONS[name]
    run = lambda q, k, v: attend(q, k, v, segments_BT, None, AttentionOptions(**options))
    check(run, arrays, [want, *grads], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["reference", "saved weights", "flash"])
def test_attention_with_dropout_matches_the_equations(name, dtype, platform):
    """The mask is the same on every platform, because it is a hash of the key and the index."""
    arrays = attention_operands(kv_heads=2)
    dropout = Dropout(0.25, jax.random.split(jax.random.key(0), 2))
    bound: Any = dropout.bind(0, DropoutSite.ATTENTION_WEIGHTS)
    keep_BNTS = np.asarray(bound(jnp.ones((2, 4, 128, 128))), np.float32)
    assert abs((keep_BNTS == 0).mean() - 0.25) < 0.01

    def equations(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * 0.125
        masked = jnp.where(jnp.tri(128, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(masked) * keep_BNTS, v)

    *qkv, weights = (array.astype(np.float32) for array in rounded(arrays, dtype))
    with exact("float32"):
        want = value_and_grads(equations, qkv, weights)
    options = AttentionOptions(causal=True, window=0, scale=0.125)
    run = lambda q, k, v: IMPLEMENTATIONS[name](q, k, v, None, bound, options)
    check(run, arrays, want, dtype)


# ---- other kernels ---------------------------------------------------------------------------

stacked = lambda row: lambda *arrays: jnp.stack(row("BTD,DCNH->BTCNH", *arrays))
TARGETS_BT = np.arange(256).reshape(4, 64) * 19 - 1
KERNELS = {  # how to call the row of an operation, and the operands
    "add_positions": (lambda row: row, [draw(32, 64, 48), draw(64, 48, seed=1)]),
    "residual_and_norm": (
        lambda row: lambda x: jnp.stack(row(x, Norm("layernorm", 768, gain=False))),
        [3 + draw(4, 64, 768)],
    ),
    "gelu_tanh": (lambda row: row, [4 * draw(8, 1000)]),
    "linear_parts": (
        stacked,
        [draw(4, 64, 128), draw(128, 3, 2, 64, seed=1), draw(3, 2, 64, seed=2)],
    ),
    "token_losses": (
        lambda row: lambda logits: row(logits, TARGETS_BT),
        [8 * draw(4, 64, 5000)],
    ),
    "normalize": (lambda row: partial(row, centered=True), [3 + draw(16, 768), draw(768, seed=1)]),
}


def test_every_gpu_row_is_compared_with_its_reference():
    assert {*KERNELS, "attention_reference", "folds_gains"} == {*GPU_ROWS}
    in_table = {row for (name, _), row in TABLE.items() if name.startswith("attention")}
    others = {attention.attention_cpu, attention.attention_splash}
    assert in_table == {*IMPLEMENTATIONS.values()} | others


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("operation", KERNELS)
def test_gpu_row_matches_its_reference(operation, dtype, platform, monkeypatch):
    monkeypatch.setattr(linear, "PARTS_MIN_SIZE", 1)
    call, arrays = KERNELS[operation]
    run, general = (call(TABLE[operation, row]) for row in ("gpu", ANY))
    shape = jax.eval_shape(general, *arrays).shape
    arrays = [*arrays, draw(*shape, seed=9)]
    *operands, weights = (array.astype(np.float32) for array in rounded(arrays, dtype))
    with exact("float32"):
        want = value_and_grads(general, operands, weights)
    check(run, arrays, want, dtype)


# ---- sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[7], [7, 3, 12]], ids=["one", "batch"])
def test_greedy_tokens_equal_those_of_numpy(prompts, platform):
    sizes = {"vocab_size": 65, "n_embd": 32, "block_size": 64, "tie_embeddings": False}
    config = reference_config(**sizes)
    params = random_params(config)
    arrays = [np.arange(length) for length in prompts]
    with exact("float32"):
        sampler = Sampler(config).load(params)
        chunks = sampler.generate(arrays, max_new_tokens=20, sampling=SamplingParams(temperature=0))
        tokens_BT = np.concatenate(list(chunks), axis=1)
    for prompt, row in zip(arrays, tokens_BT, strict=True):
        text = prompt.tolist()
        for _ in range(20):
            text.append(int(ref.forward(params, np.array([text]), config)[0][0, -1].argmax()))
        assert row[row != NO_TOKEN].tolist() == text[len(prompt) :]
        assert len({*text[len(prompt) :]}) > 3


# ---- training --------------------------------------------------------------------------------


def losses(config: Config, devices: list, batches: list) -> np.ndarray:
    """Train on these windows_UMBT from a fresh state on the first device; return the losses."""
    mesh = make_mesh(config, devices[:1])
    state, step, found = init_state(config, mesh), make_train_step(config, mesh), []
    for windows_UMBT in batches:
        state, metrics = step(state, np.asarray(windows_UMBT), np.int32(1))
        found.append(float(metrics["loss"][0]))
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "atol"),  # the largest difference of the losses, which are between 3 and 4
    [
        ({"dropout": 0.2}, 1e-4),
        ({"optimizer": "muon", "mlp": "gelu_tanh"}, 5e-3),  # orthogonalises in bfloat16
        ({"dtype": "bfloat16"}, 0.03),
    ],
    ids=str,
)
def test_five_steps_have_the_losses_of_a_cpu(keys, atol, monkeypatch, platform):
    """The CPU's steps are in float32, with the CPU's own kernels and reference attention."""
    monkeypatch.setattr(linear, "PARTS_MIN_SIZE", 1)
    attention = "cudnn" if platform == "gpu" and "dtype" in keys else "reference"
    config = make_config(n_embd=64, block_size=64, attention=attention, **keys)
    batches = 5 * [make_windows(config)]
    with exact(config.dtype):
        got = losses(config, jax.devices(), batches)
    for row, function in CPU_ROWS.items():
        monkeypatch.setitem(TABLE, row, function)
    config = config.replace(dtype="float32", attention="reference")
    want = losses(config, jax.devices("cpu"), batches)
    assert want[0] - want[4] > 0.1  # it learns
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


TRAIN_ALL = (
    "import json, sys; from jaxgpt.config import Config; from jaxgpt.runtime import device; "
    "from jaxgpt.train import train; device.start(); "
    "sys.exit(max(train(Config(**keys)) for keys in json.loads(sys.argv[1])))"
)


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, platform):
    data = make_data(tmp_path)
    sizes = {"n_embd": 64, "block_size": 64, "attention_dropout": False, "lr_decay_iters": 4}
    keys = sizes | {"device": "auto", "dtype": "auto", "attention": "auto", "mesh": "data:1"}
    keys |= {"eval_interval": 2, "max_iters": 4, "deterministic": True}
    whole, parts = (tiny_run(tmp_path / name, data, **keys) for name in ("whole", "parts"))
    runs = [whole, parts.replace(max_iters=2), parts.replace(init_from="resume")]
    command = [sys.executable, "-c", TRAIN_ALL, json.dumps([run.to_dict() for run in runs])]
    done = subprocess.run(command, env=CHILD_ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 2" in done.stdout
    assert state_of(whole, 4) == state_of(parts, 4)
