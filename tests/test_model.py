"""The Flax model against the NumPy one: values and gradients of every option."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import numpy_gpt as ref
from reference.options import DEFAULTS, LECTURE, MODEL_CASES

from jaxgpt import model
from jaxgpt.attention import Cache, KeysValues, Place
from jaxgpt.config import Config
from jaxgpt.layers import Dropout
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


# ---- the same function, run in other ways ----------------------------------------------------


def stacked(params: dict) -> dict:
    """The parameters as `scan_layers` keeps them."""
    blocks = params["blocks"].values()
    return params | {"blocks": jax.tree.map(lambda *layers: np.stack(layers), *blocks)}


SCANNABLE = [{}, {"value_residual": True, "n_layer": 3, "position": "rope", "n_kv_head": 2}]
SCANNED = [(options, remat) for options in SCANNABLE for remat in ("none", "dots", "full")]
SCANNED += [(LECTURE | {"norm": "none", "mlp": "none", "residual": False}, "full")]


@pytest.mark.parametrize(("options", "remat"), SCANNED, ids=str)
def test_scanned_layers_and_recomputation_change_nothing(options, remat):
    config = make_config(**options)
    params, tokens, targets = random_case(config)
    want_loss, want = loss_and_grads(config, params, tokens, targets)
    for scan in (False, True):
        other = config.replace(remat=remat, scan_layers=scan)
        loss, grads = loss_and_grads(other, stacked(params) if scan else params, tokens, targets)
        assert loss == pytest.approx(float(want_loss), rel=1e-6)
        grads = model.unstack(grads) if scan else grads
        for path, grad in ref.flatten(grads).items():
            np.testing.assert_allclose(grad, ref.flatten(want)[path], atol=1e-5, err_msg=path)


def test_recomputation_takes_no_more_products_again_than_it_says():
    config = make_config(n_layer=1, norm="none")  # a norm's sums are products on a CPU
    params, tokens, targets = random_case(config)

    def products(remat: str) -> int:
        run = lambda params: loss_and_grads(config.replace(remat=remat), params, tokens, targets)
        return (jax.jit(run).lower(params).compile().as_text() or "").count(" dot(")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert dots == none + 2  # attention's, which are no linear maps
    assert full > dots


def test_scanned_layers_start_as_the_others_do_and_unstack_undoes_them():
    config = make_config(n_layer=3)
    key = jax.random.key(0)
    plain, scanned = (model.init(config.replace(scan_layers=s), key) for s in (False, True))
    for path, value in ref.flatten(model.unstack(scanned)).items():
        np.testing.assert_array_equal(value, ref.flatten(plain)[path], err_msg=path)


def test_dropout_is_the_same_scanned_or_not_and_off_without_a_rate():
    config = make_config(n_layer=2)
    params, tokens, _ = random_case(config)
    keys = jax.random.split(jax.random.key(0), len(tokens))

    def features(config, params, drop):
        graphdef, _, _ = model.split(config)
        return jax.jit(lambda p: nnx.merge(graphdef, p).features(tokens, drop)[0])(params)

    plain = features(config, params, Dropout(0.3, keys))
    scanned = features(config.replace(scan_layers=True), stacked(params), Dropout(0.3, keys))
    np.testing.assert_allclose(plain, scanned, atol=1e-5)
    assert not np.allclose(plain, features(config, params, Dropout(0.3, keys[::-1])))
    assert not np.allclose(plain, features(config, params, Dropout()))


# ---- what GPT-2 prescribes -------------------------------------------------------------------


def test_a_token_changes_the_logits_from_its_place_on_and_none_before():
    config = make_config(n_layer=2)
    params, tokens, _ = random_case(config)
    network = nnx.merge(model.split(config)[0], jax.tree.map(jnp.asarray, params))
    logits = jax.jit(lambda tokens: network(tokens))
    base = np.asarray(logits(tokens))[..., : config.vocab_size]
    for t in range(config.block_size):
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % config.vocab_size
        changed = (np.asarray(logits(other))[..., : config.vocab_size] != base).any((0, 2))
        np.testing.assert_array_equal(changed, np.arange(config.block_size) >= t)


def test_initial_weights_have_gpt2s_deviations():
    config = make_config(n_layer=8, n_embd=128, mlp_dim=512, vocab_size=1000, block_size=256)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    residual = 0.02 / math.sqrt(2 * config.n_layer)
    for path, value in ref.flatten(params).items():
        name = path.split(".")[-1]
        if name != "kernel":
            assert np.all(value == (1 if name == "scale" else 0)), path
            continue
        std = residual if path.endswith(("attn.out.kernel", "mlp.down.kernel")) else 0.02
        assert np.std(value) == pytest.approx(std, rel=0.03), path
        assert abs(np.mean(value)) < 0.05 * std, path


def test_blocks_with_zero_projections_first_pass_on_what_they_get():
    config = make_config(zero_init_projections=True, vocab_size=65)
    params = model.init(config, jax.random.key(0))
    tokens = np.arange(7)[None]
    blocks = nnx.merge(model.split(config)[0], params)(tokens)
    none = nnx.merge(model.split(config.replace(n_layer=0))[0], params | {"blocks": {}})(tokens)
    np.testing.assert_array_equal(blocks, none)
    plain = model.init(config.replace(zero_init_projections=False), jax.random.key(0))
    differing = {
        path
        for path, value in ref.flatten(plain).items()
        if np.any(value != ref.flatten(params)[path])
    }
    assert {path.split(".", 2)[2] for path in differing} == {"attn.out.kernel", "mlp.down.kernel"}


def test_initial_loss_is_that_of_a_uniform_guess():
    config = make_config(vocab_size=65, n_embd=64, n_layer=2, block_size=32)
    params = model.init(config, jax.random.key(0))
    tokens, targets = np.random.default_rng(0).integers(0, 65, (2, 8, 32))
    loss, _ = loss_and_grads(config, params, tokens, targets)
    assert float(loss) == pytest.approx(math.log(65), abs=0.05)


def test_padded_ids_have_no_probability_and_no_gradient():
    config = make_config()
    params, tokens, targets = random_case(config)
    graphdef, _, _ = model.split(config)
    logits = nnx.merge(graphdef, params)(tokens)
    assert logits.shape[-1] == 128
    assert np.all(np.asarray(logits)[..., config.vocab_size :] == -np.inf)
    _, grads = loss_and_grads(config, params, tokens, targets)
    assert np.all(np.asarray(grads["embed"]["kernel"])[config.vocab_size :] == 0)


def test_a_cache_is_invisible_beyond_what_it_holds():
    """Garbage in places that are not filled yet, or no more looked at, changes nothing."""
    config = make_config(n_layer=2)
    params, tokens, _ = random_case(config)
    network = nnx.merge(model.split(config)[0], params)
    _, caches = network.features(tokens[:, :3], caches=model.init_caches(config, len(tokens), 4))
    start_B = jnp.full(len(tokens), 3)
    for step in range(2):  # the tokens at 3 and 4, of a chunk of 4
        token_B1, place = tokens[:, 3 + step : 4 + step], Place(start_B, step)
        dirty = [
            Cache(*(KeysValues(*(x.at[:, end:].set(1e3) for x in part)) for part, end in parts))
            for parts in (zip(cache, (3, step), strict=True) for cache in caches)
        ]
        clean, caches = network.features(token_B1, caches=caches, place=place)
        again, _ = network.features(token_B1, caches=dirty, place=place)
        np.testing.assert_array_equal(clean, again)


@pytest.mark.parametrize("options", [o for o in MODEL_CASES if o.get("causal", True)], ids=str)
def test_tokens_of_a_chunk_and_of_one_appended_are_the_whole_forwards(options):
    config = make_config(**options)
    params, tokens, _ = random_case(config)
    network = nnx.merge(model.split(config)[0], params)
    whole, _ = network.features(tokens)
    rows, start_B = np.arange(len(tokens)), np.array([1, 2, 1])
    _, caches = network.features(tokens[:, :2], caches=model.init_caches(config, len(tokens), 3))
    for steps in (3, 2):
        for step in range(steps):
            at_B = start_B + step
            place = Place(jnp.array(start_B), step)
            got, caches = network.features(tokens[rows, at_B][:, None], caches=caches, place=place)
            np.testing.assert_allclose(got[:, 0], whole[rows, at_B], rtol=0, atol=1e-5)
        caches = [cache._replace(past=cache.append(jnp.array(start_B))) for cache in caches]
        start_B += steps


# sizes that nanoGPT prints for these models, and its formula
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
def test_parameters_and_flops_are_counted_as_nanogpt_counts_them(options, millions):
    config = Config(**{"bias": False} | options)
    count = model.count_params(config)
    assert round(count / 1e6, 2) == millions
    per_token = 6 * count + 12 * config.n_layer * config.n_embd * config.block_size
    assert model.flops_per_token(config) == per_token
