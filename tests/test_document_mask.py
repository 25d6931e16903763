"""Test document_mask: the documents of a window are computed independently."""

import itertools

import jax
import numpy as np
import pytest
from helpers import build_model, loss_and_grads, random_params, reference_config
from reference import numpy_gpt as ref

from jaxgpt import model
from jaxgpt.config import Config, UserError
from jaxgpt.interop import huggingface
from jaxgpt.runtime import device
from jaxgpt.sample import Sampler, SamplingParams

EOT = 0
TOKENS = np.array(  # EOT in the middle, at both ends, twice in a row, and absent
    [
        [3, 1, 4, EOT, 1, 5, 9, 2, 6, EOT, 5, 3],
        [EOT, 5, 8, 9, 7, EOT, EOT, 9, 3, 2, 3, EOT],
        [8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7],
    ]
)
TARGETS = np.roll(TOKENS, -1, axis=1)
TARGETS[0, 2:5] = -1


def make_config(**options) -> Config:
    return reference_config(**{"block_size": 12, "document_mask": True, "eot_id": EOT} | options)


def test_document_mask_rejects_cudnn_and_auto_selects_another_backend():
    config = make_config(attention="auto", dtype="bfloat16", block_size=128, n_embd=32)
    assert device.choose_attention(config, target_platform="gpu") == ("flash", [])
    in_float32 = config.replace(dtype="float32")
    chosen, (line,) = device.choose_attention(in_float32, target_platform="gpu")
    assert chosen == "xla"
    assert "because flash needs dtype=bfloat16, not float32" in line
    with pytest.raises(UserError, match="attention='cudnn': cannot keep documents apart"):
        device.choose_attention(config.replace(attention="cudnn"), target_platform="gpu")
    assert device.choose_attention(config, target_platform="tpu") == ("splash", [])


@pytest.mark.parametrize(("capability", "backend"), [("9.0", "cudnn"), ("8.0", "flash")])
def test_wide_heads_are_cudnns_from_hopper_on_also_on_gpus_that_are_not_attached(
    capability, backend
):
    keys = {"attention": "auto", "dtype": "bfloat16", "document_mask": False, "n_embd": 512}
    config = make_config(**keys, n_head=2)
    assert device.choose_attention(config, "gpu", capability) == (backend, [])


@pytest.mark.parametrize("backend", ["cudnn", "splash", "xla"])
def test_back_ends_without_dropout_of_the_weights_are_refused_with_it(backend):
    config = make_config(attention=backend, dtype="bfloat16", block_size=128, n_embd=32)
    config = config.replace(dropout=0.1, document_mask=False)
    platform = "tpu" if backend == "splash" else "gpu"
    with pytest.raises(UserError, match=f"attention='{backend}': has no dropout of attention w"):
        device.choose_attention(config, target_platform=platform)
    without = config.replace(attention_dropout=False)
    assert device.choose_attention(without, target_platform=platform) == (backend, [])


def one_by_one(config: Config, params: dict) -> tuple[float, dict]:
    """Return the reference's loss and gradients, from one pass per document.

    The reference has no document masks: each document is a separate batch, with the positions
    that the document has in the window.
    """
    total, count, sums = 0.0, 0, {path: np.zeros_like(p) for path, p in ref.flatten(params).items()}
    for tokens, targets in zip(TOKENS, TARGETS, strict=True):
        begins = {0, *np.flatnonzero(tokens == EOT).tolist()}
        for a, b in itertools.pairwise([*sorted(begins), len(tokens)]):
            own = dict(params)
            if "pos_embed" in params:
                own["pos_embed"] = {"kernel": params["pos_embed"]["kernel"][a:]}
            loss, grads = ref.loss_and_grads(own, tokens[None, a:b], targets[None, a:b], config)
            n = int((targets[a:b] >= 0).sum())
            total, count = total + n * loss, count + n
            for path, grad in ref.flatten(grads).items():
                rows = slice(a, None) if path.startswith("pos_embed") else ...
                sums[path][rows] += n * grad
    return total / count, {path: grad / count for path, grad in sums.items()}


CASES = [
    {},
    {"position": "rope", "n_kv_head": 2, "qk_norm": True, "sliding_window": 3},
    {"scan_layers": True, "remat": "full", "value_residual": True},
    {"attention": "xla", "remat": "dots", "position": "none", "causal": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES, ids=str)
def test_masked_loss_and_gradients_match_separate_documents(options):
    config = make_config(**options)
    params = random_params(config)
    ours = huggingface.stack_layers(params) if config.scan_layers else params
    loss, grads = loss_and_grads(config, ours, TOKENS, TARGETS)
    grads = model.unstack_layers(grads) if config.scan_layers else grads
    want_loss, want = one_by_one(config, params)
    assert float(loss) == pytest.approx(want_loss, rel=1e-5)
    for path, grad in ref.flatten(grads).items():
        np.testing.assert_allclose(grad, want[path], rtol=0, atol=1e-5, err_msg=path)
    unmasked, _ = loss_and_grads(config.replace(document_mask=False), ours, TOKENS, TARGETS)
    assert abs(float(unmasked) - want_loss) > 1e-4


def test_kv_cache_ignores_the_document_mask():
    config = make_config()
    params = model.init_params(config, jax.random.key(0))
    network = build_model(config, params)
    cached, _ = network(TOKENS, cache=network.init_cache(len(TOKENS), 1))
    plain = build_model(config.replace(document_mask=False), params)
    np.testing.assert_allclose(cached, plain(TOKENS), atol=1e-6)
    assert not np.allclose(cached, network(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["truncate", "slide"])
def test_sampling_ignores_the_document_mask(overflow):
    """With "slide" no cache is used once the text is full."""
    config = make_config()
    params = random_params(config)

    def sampled(config: Config) -> list[int]:
        keys = {"sampling": SamplingParams(temperature=0.0), "overflow": overflow}
        chunks = Sampler(config).load(params).generate([TOKENS[0]], max_new_tokens=16, **keys)
        return np.concatenate([tokens_Bn[0] for tokens_Bn in chunks]).tolist()

    assert sampled(config) == sampled(config.replace(document_mask=False))
