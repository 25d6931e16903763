"""Test the NumPy reference against loops, finite differences, PyTorch and Hugging Face."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reference import numpy_gpt as ref
from reference.gpt2 import Golden
from reference.options import DEFAULTS, LECTURE_CASES, MODEL_CASES

GOLDEN = Path(__file__).parent / "golden" / "gpt2_tiny.npz"


# --- Attention ----------------------------------------------------------------------------------

# (T, S, N, K, options): "mask" stands for a random mask, which hides every key from one query.
ATTENTION_CASES = [
    (5, 5, 2, 2, {}),
    (5, 5, 2, 2, {"causal": False}),
    (6, 6, 4, 2, {"window": 3}),
    (3, 7, 4, 1, {}),
    (3, 7, 4, 2, {"window": 2}),
    (7, 3, 2, 1, {"causal": False}),
    (5, 5, 2, 2, {"causal": False, "window": 2}),
    (4, 6, 6, 2, {"mask": True}),
    (4, 4, 2, 1, {"mask": True, "causal": False}),
]


def attention_inputs(T: int, S: int, N: int, K: int, options: dict) -> tuple[list, dict]:
    """Return random [q, k, v, dout] and the keywords of `attention`."""
    B, H, rng = 2, 4, np.random.default_rng(T + S + N + K)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    options = {"scale": 0.7} | options
    if options.pop("mask", False):
        options["mask_BTS"] = rng.random((B, T, S)) < 0.7
        options["mask_BTS"][0, 1] = False
    return [rng.standard_normal(shape) for shape in shapes], options


def attention_written_out(q, k, v, scale, causal=True, window=0, mask_BTS=None) -> np.ndarray:
    """Compute attention one query at a time, over the list of visible keys."""
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                head, position = n // (N // K), t + max(S - T, 0)
                keys = [s for s in range(S) if not causal or s <= position]
                keys = [s for s in keys if not window or position - s < window]
                keys = [s for s in keys if mask_BTS is None or mask_BTS[b, t, s]]
                e = [math.exp(scale * float(q[b, t, n] @ k[b, s, head])) for s in keys]
                for s, weight in zip(keys, e, strict=True):
                    out[b, t, n] += weight / sum(e) * v[b, s, head]
    return out


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_reference_attention_equals_a_loop_over_queries(case):
    (q, k, v, _), options = attention_inputs(*case)
    expected = attention_written_out(q, k, v, **options)
    np.testing.assert_allclose(ref.attention(q, k, v, **options), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_reference_attention_gradients_match_finite_differences(case):
    (q, k, v, dout), options = attention_inputs(*case)
    dq, dk, dv = ref.attention_backward(dout, q, k, v, **options)
    check_gradients(
        lambda p: float((ref.attention(**p, **options) * dout).sum()),
        {"q_BTNH": q, "k_BSKH": k, "v_BSKH": v},
        {"q_BTNH": dq, "k_BSKH": dk, "v_BSKH": dv},
    )


def check_gradients(loss, params: dict, grads: dict, step: float = 1e-5) -> None:
    """Compare each gradient along a random direction with a central difference of `loss`."""
    rng = np.random.default_rng(0)
    flat, flat_grads = ref.flatten(params), ref.flatten(grads)
    assert flat.keys() == flat_grads.keys()
    for path, p in flat.items():
        assert flat_grads[path].shape == p.shape, path
        direction = rng.standard_normal(p.shape)
        direction /= np.linalg.norm(direction)  # keeps `step` small for large leaves
        ahead, behind = (
            loss(ref.unflatten(flat | {path: p + sign * step * direction}, params))
            for sign in (1, -1)
        )
        numeric = (ahead - behind) / (2 * step)
        analytic = float((flat_grads[path] * direction).sum())
        # The absolute tolerance covers rounding, so that zero gradients can be compared.
        assert numeric == pytest.approx(analytic, rel=1e-6, abs=1e-10), path


# --- The whole model ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODEL_CASES + LECTURE_CASES, ids=str)
def test_reference_model_gradients_match_finite_differences(options):
    config = SimpleNamespace(**DEFAULTS | options)
    rng = np.random.default_rng(1)
    params = ref.init_params(config, rng)
    tokens, targets = rng.integers(0, config.vocab_size, (2, 3, config.block_size - 1))
    targets[0, :2] = ref.IGNORE
    _, grads = ref.loss_and_grads(params, tokens, targets, config)
    check_gradients(lambda p: ref.forward(p, tokens, config, targets)[1], params, grads)


# --- Hugging Face GPT-2, trained by PyTorch -----------------------------------------------------


def assert_close(actual, expected, tolerance: float, name: str = "") -> None:
    """Assert that the largest error is below `tolerance` times the largest expected magnitude."""
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


def test_reference_matches_hugging_face_gpt2_and_torch_adamw():
    golden = Golden(GOLDEN)
    arrays, hyper = golden.arrays, golden.hyper
    config = SimpleNamespace(**DEFAULTS | {"mlp": "gelu_tanh"} | golden.sizes)
    tokens, targets, params = arrays["tokens"], arrays["targets"], golden.params("param")

    logits, loss, cache = ref.forward(params, tokens[0], config, targets[0])
    assert_close(logits[..., : config.vocab_size], arrays["logits"], 1e-10)
    assert np.all(logits[..., config.vocab_size :] == -np.inf)
    assert loss == pytest.approx(arrays["loss"].item(), rel=1e-10)
    grads = ref.flatten(ref.backward(params, config, cache))
    for path, expected in ref.flatten(golden.params("grad")).items():
        assert_close(grads[path], expected, 1e-10, path)

    schedule = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters")
    state = ref.adamw_init(params)
    for it in range(hyper["max_iters"]):
        lr = ref.cosine_lr(it, **{key: hyper[key] for key in schedule})
        loss, grads = ref.loss_and_grads(params, tokens[it], targets[it], config)
        params, state, norm = ref.adamw_step(
            params,
            grads,
            state,
            lr=lr,
            betas=(hyper["beta1"], hyper["beta2"]),
            **{key: hyper[key] for key in ("weight_decay", "grad_clip")},
        )
        expected = [arrays[f"train/{key}"][it] for key in ("loss", "norm", "lr")]
        assert [loss, norm, lr] == pytest.approx(expected, rel=1e-8)
    trained = ref.flatten(params)
    for path, expected in ref.flatten(golden.params("final")).items():
        assert_close(trained[path], expected, 1e-8, path)
