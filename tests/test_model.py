"""Test values and gradients of the Flax model against NumPy, for every option."""

import math
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_trees_close,
    build_model,
    loss_and_grads,
    random_params,
)
from helpers import reference_config as make_config
from reference import numpy_gpt as ref
from reference.options import DEFAULTS, MODEL_CASES

from jaxgpt import model, resolve
from jaxgpt.config import Config, ModelConfig
from jaxgpt.interop import huggingface
from jaxgpt.kernels import TABLE
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.kernels.kv_cache import KV, DecodePosition, KVCache, flush_chunk
from jaxgpt.kernels.norm import norm_reference

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def random_tokens(config: Config) -> np.ndarray:
    """Return random tokens and targets; the first two targets are ignored."""
    tokens, targets = np.random.default_rng(1).integers(
        0, config.vocab_size, (2, 3, config.block_size)
    )
    targets[0, :2] = -1
    return np.stack([tokens, targets])


IN_OTHER_TESTS = {
    "dropout", "attention_dropout", "document_mask", "eot_id",
    "zero_init_projections",  # changes initial values only
}  # fmt: skip


def test_every_key_of_a_model_is_compared_with_numpy():
    compared = {*DEFAULTS}.union(*MODEL_CASES)
    assert {field.name for field in fields(ModelConfig)} == compared | IN_OTHER_TESTS


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", MODEL_CASES, ids=str)
def test_model_loss_and_gradients_match_numpy(options, dtype):
    config = make_config(**options, dtype=dtype)
    params, windows = random_params(config, dtype), random_tokens(config)
    with jax.enable_x64(dtype == "float64"):
        loss, grads = loss_and_grads(config, params, *windows)
    want_loss, want = ref.loss_and_grads({"blocks": {}} | params, *windows, config)
    assert loss == pytest.approx(want_loss, rel=TOLERANCE[dtype])
    largest = max(abs(grad).max() for grad in ref.flatten(want).values())
    assert_trees_close(grads, want, atol=TOLERANCE[dtype] * max(1, largest))


# ---- scanned layers, recomputation and dropout -----------------------------------------------

SCANNABLE = [{}, {"value_residual": True, "n_layer": 3, "position": "rope", "n_kv_head": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("options", SCANNABLE, ids=str)
def test_scan_layers_and_remat_keep_loss_and_gradients(options, remat):
    config = make_config(**options)
    params, windows = random_params(config), random_tokens(config)
    want_loss, want = loss_and_grads(config, params, *windows)
    loss, grads = loss_and_grads(config.replace(remat=remat), params, *windows)
    scanned = config.replace(remat=remat, scan_layers=True)
    scanned_loss, stacked = loss_and_grads(scanned, huggingface.stack_layers(params), *windows)
    assert [loss, scanned_loss] == pytest.approx([float(want_loss)] * 2, rel=1e-6)
    assert_trees_close(grads, want, atol=1e-5)
    assert_trees_close(model.unstack_layers(stacked), want, atol=1e-5)


def test_remat_dots_recomputes_only_attention_products(monkeypatch):
    """The CPU's norm is replaced, because its sums are computed as matrix products."""
    monkeypatch.setitem(TABLE, ("normalize", "cpu"), norm_reference)
    config = make_config(n_layer=1)
    params, windows = random_params(config), random_tokens(config)

    def products(remat: str) -> int:
        run = lambda params: loss_and_grads(config.replace(remat=remat), params, *windows)
        return jax.jit(run).lower(params).as_text().count("stablehlo.dot_general")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert dots == none + 2  # the products of attention, which are not linear maps
    assert full > dots


def test_scanned_layers_have_the_same_initial_weights():
    config = make_config(n_layer=3)
    plain = model.init_params(config, jax.random.key(0))
    scanned = model.init_params(config.replace(scan_layers=True), jax.random.key(0))
    assert_trees_close(model.unstack_layers(scanned), plain, atol=0)


def test_dropout_is_equal_for_scanned_and_unscanned_layers():
    config = make_config()
    params, (tokens, _) = random_params(config), random_tokens(config)
    keys = jax.random.split(jax.random.key(0), len(tokens))

    def hidden(config: Config, params: dict, dropout: Dropout) -> jax.Array:
        return jax.jit(lambda p: build_model(config, p)(tokens, dropout))(params)

    plain = hidden(config, params, Dropout(0.3, keys))
    stacked = huggingface.stack_layers(params)
    scanned = hidden(config.replace(scan_layers=True), stacked, Dropout(0.3, keys))
    np.testing.assert_allclose(plain, scanned, atol=1e-5)
    assert not np.allclose(plain, hidden(config, params, Dropout(0.3, keys[::-1])))
    assert not np.allclose(plain, hidden(config, params, Dropout()))


@pytest.mark.parametrize("attention_dropout", [True, False])
def test_dropout_acts_on_embeddings_attention_weights_and_branch_outputs(
    attention_dropout, monkeypatch
):
    seen = set()
    note = lambda self, layer, site: seen.add((layer, site))  # returns None, which is no dropout
    monkeypatch.setattr(Dropout, "bind", note)
    config = make_config(attention_dropout=attention_dropout)
    network, (tokens, _) = build_model(config, random_params(config)), random_tokens(config)
    network(tokens, Dropout(0.5))
    sites = {DropoutSite.ATTENTION_OUTPUT, DropoutSite.MLP_OUTPUT}
    sites |= {DropoutSite.ATTENTION_WEIGHTS} if attention_dropout else set()
    in_layers = {(layer, site) for layer in range(config.n_layer) for site in sites}
    assert seen == in_layers | {(config.n_layer, DropoutSite.EMBEDDING)}


# ---- properties of GPT-2 ---------------------------------------------------------------------


def test_token_change_affects_logits_only_from_that_position_on():
    config = make_config()
    network, (tokens, _) = build_model(config, random_params(config)), random_tokens(config)
    logits = jax.jit(lambda tokens: network(tokens)[..., : config.vocab_size])
    base = np.asarray(logits(tokens))
    for t in range(config.block_size):
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % config.vocab_size
        changed = (np.asarray(logits(other)) != base).any((0, 2))
        np.testing.assert_array_equal(changed, np.arange(config.block_size) >= t)


@pytest.mark.slow
def test_initial_weights_have_gpt2_standard_deviations():
    config = make_config(n_layer=8, n_embd=128, mlp_dim=512, vocab_size=1000, block_size=256)
    params = jax.jit(model.init_params, static_argnums=0)(config, jax.random.key(0))
    for path, value in ref.flatten(params).items():
        name = path.split(".")[-1]
        if name != "kernel":
            assert np.all(value == (1 if name == "scale" else 0)), path
            continue
        is_last = path.endswith(("attn.out.kernel", "mlp.down.kernel"))
        std = 0.02 / math.sqrt(2 * config.n_layer) if is_last else 0.02
        assert np.std(value) == pytest.approx(std, rel=0.03), path
        assert abs(np.mean(value)) < 0.05 * std, path


def test_zero_init_projections_make_blocks_the_identity():
    config = make_config(zero_init_projections=True, vocab_size=65)
    params = model.init_params(config, jax.random.key(0))
    tokens = np.arange(7)[None]
    no_blocks = {path: tree for path, tree in params.items() if path != "blocks"}
    want = build_model(config.replace(n_layer=0), no_blocks)(tokens)
    np.testing.assert_array_equal(build_model(config, params)(tokens), want)
    plain = model.init_params(config.replace(zero_init_projections=False), jax.random.key(0))
    zeroed = ref.flatten(params)
    differing = {path for path, p in ref.flatten(plain).items() if np.any(p != zeroed[path])}
    assert {path.split(".", 2)[2] for path in differing} == {"attn.out.kernel", "mlp.down.kernel"}


def test_padded_ids_have_no_probability_and_no_gradient():
    config = make_config()
    params, windows = random_params(config), random_tokens(config)
    logits = build_model(config, params)(windows[0])
    assert logits.shape[-1] == 128
    assert np.all(np.asarray(logits)[..., config.vocab_size :] == -np.inf)
    _, grads = loss_and_grads(config, params, *windows)
    assert np.all(np.asarray(grads["embed"]["kernel"])[config.vocab_size :] == 0)


# nanoGPT prints these sizes for these models; the FLOPs follow nanoGPT's formula
@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({"vocab_size": 65, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}, 10.65),
        ({"vocab_size": 65, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}, 0.80),
        ({"vocab_size": 50257, "bias": True}, 123.65),
        ({"vocab_size": 50257, "bias": True, "n_layer": 48, "n_head": 25, "n_embd": 1600}, 1555.97),
    ],
    ids=["shakespeare", "shakespeare_cpu", "gpt2", "gpt2-xl"],
)
def test_parameter_and_flop_counts_match_nanogpt(options, millions):
    config = Config(**{"bias": False} | options)
    count = resolve.count_params(config)
    assert round(count / 1e6, 2) == millions
    per_token = 6 * count + 12 * config.n_layer * config.n_embd * config.block_size
    assert resolve.flops_per_token(config) == per_token


# ---- KV cache --------------------------------------------------------------------------------


@pytest.mark.slow
def test_unfilled_cache_positions_do_not_affect_logits():
    """Garbage in positions that are not filled yet does not change the logits."""
    config = make_config()
    network, (tokens, _) = build_model(config, random_params(config)), random_tokens(config)
    _, cache = network(tokens[:, :3], cache=network.init_cache(len(tokens), 4))
    start_B = jnp.full(len(tokens), 3)

    def garbage(kv: KV, end: int) -> KV:
        return KV(*(x.at[:, end:].set(1e3) for x in kv))

    for step in range(2):  # the tokens at 3 and 4, of a chunk of 4
        token_B1, position = tokens[:, 3 + step : 4 + step], DecodePosition(start_B, step)
        dirty = [KVCache(garbage(kv.past, 3), garbage(kv.chunk, step)) for kv in cache]
        clean, cache = network(token_B1, cache=cache, position=position)
        again, _ = network(token_B1, cache=dirty, position=position)
        np.testing.assert_array_equal(clean, again)


@pytest.mark.slow
@pytest.mark.parametrize("options", [o for o in MODEL_CASES if o.get("causal", True)], ids=str)
def test_cached_logits_equal_full_forward_before_and_after_flush(options):
    config = make_config(**options)
    network, (tokens, _) = build_model(config, random_params(config)), random_tokens(config)
    whole = network(tokens)
    rows, start_B = np.arange(len(tokens)), np.array([1, 2, 1])
    _, cache = network(tokens[:, :2], cache=network.init_cache(len(tokens), 3))
    for steps in (3, 2):
        for step in range(steps):
            at_B, position = start_B + step, DecodePosition(jnp.array(start_B), step)
            token_B1 = tokens[rows, at_B][:, None]
            got, cache = network(token_B1, cache=cache, position=position)
            np.testing.assert_allclose(got[:, 0], whole[rows, at_B], rtol=0, atol=1e-5)
        cache = [kv._replace(past=flush_chunk(kv, jnp.array(start_B))) for kv in cache]
        start_B += steps


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_keeps_the_input_dtype(kind):
    x = jnp.asarray(100 + jax.random.normal(jax.random.key(0), (8, 512)), jnp.bfloat16)
    y = model.Norm(kind, 512, bias=True)(x)
    assert y.dtype == jnp.bfloat16
    want = ref.norm(np.asarray(x, np.float64), {"scale": 1}, kind)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=0.02)
