"""Test the lecture's models against NumPy and PyTorch, and the stages of the lecture."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    ROOT,
    assert_trees_close,
    call_step,
    loss_and_grads,
    make_windows,
    refusal,
    take_steps,
)
from reference import numpy_gpt as ref
from reference.options import DEFAULTS, LECTURE_CASES

from examples.lecture.config import LectureConfig
from jaxgpt import model, resolve
from jaxgpt.config import Config
from jaxgpt.kernels.dropout import Dropout, DropoutSite
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.train_step import init_state, make_train_step

FILES = sorted(Path(ROOT, "configs", "lecture").glob("*.py"))
STAGES = FILES[:-1]
CONFIGS = {path.stem: load_config_file(str(path)) for path in FILES}
FULL = CONFIGS["full_script"]["config"]
EXACT = {"dtype": "float64", "attention": "reference", "mesh": "data:1"}
with np.load(ROOT / "tests" / "golden" / "full_script.npz") as archive:
    GOLDEN = dict(archive)


# ---- the equations ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("options", LECTURE_CASES, ids=str)
def test_lecture_loss_and_gradients_match_numpy(options, dtype, tolerance):
    reference = SimpleNamespace(**DEFAULTS | options)
    keys = DEFAULTS | options | {"dtype": dtype, "attention": "reference"}
    rng = np.random.default_rng(1)
    params = ref.init_params(reference, rng, np.dtype(dtype))
    params["blocks"] = dict(enumerate(params["blocks"]))
    tokens, targets = rng.integers(0, 11, (2, 3, 7))
    with jax.enable_x64(dtype == "float64"):
        got = loss_and_grads(LectureConfig.from_dict(keys), params, tokens, targets)
    want = ref.loss_and_grads(params, tokens, targets, reference)
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert_trees_close(got[1], want[1], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": False, "norm_position": "post", "position": "sinusoidal"}]
)
def test_lecture_config_with_default_keys_trains_like_the_core_gpt(options):
    """Initial weights, dropout and training steps are equal, with tied and untied embeddings."""
    keys = DEFAULTS | EXACT | {"n_layer": 1, "batch_size": 8, "gradient_accumulation_steps": 1}
    runs = []
    with jax.enable_x64(True):
        for config_class in Config, LectureConfig:
            config = config_class(**keys | options, dropout=0.2)
            runs.append(take_steps(config, [make_windows(config, micro=1)] * 3))
    assert_trees_close(*(state.params for state, _ in runs), 1e-12)
    assert [row["loss"] for row in runs[0][1]] == pytest.approx([r["loss"] for r in runs[1][1]])


@pytest.mark.slow
def test_training_steps_are_equal_on_a_three_axis_mesh():
    """The heads are split over `tensor` and only concatenated; the steps have dropout."""
    config = FULL.replace(**EXACT, vocab_size=300, block_size=12, n_layer=2, n_embd=40)
    config = config.replace(norm="none", residual=False, batch_size=8)
    with jax.enable_x64(True):
        batches = [make_windows(config, micro=1)] * 3
        got, want = (
            take_steps(config.replace(mesh=mesh), batches)
            for mesh in ("data:2,fsdp:2,tensor:2", "data:1")
        )
    assert_trees_close(got[0].params, want[0].params, 1e-9)
    assert [row["loss"] for row in got[1]] == pytest.approx([r["loss"] for r in want[1]], rel=1e-9)


# ---- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm", True),
        ("value_residual", True),
        ("document_mask", True),
        ("scan_layers", True),
        ("norm_gain", False),
    ],
)
def test_core_only_keys_are_rejected_by_lecture_config(key, value):
    advice = f"expected {not value}; try {key}={not value}"
    said = f"{key}={value}: the lecture's model does not have this key; {advice}"
    assert refusal(LectureConfig, **{key: value}) == said


def test_biases_and_norms_decay_only_with_decay_bias_and_norm():
    config = FULL.replace(vocab_size=11, n_embd=16)
    _, shapes, _ = model.abstract_model(config)
    assert set(jax.tree.leaves(config.weight_decay_mask(shapes))) == {True}
    mask = ref.flatten(config.replace(decay_bias_and_norm=False).weight_decay_mask(shapes))
    assert all(decays == path.endswith("kernel") for path, decays in mask.items())


# ---- the full script -------------------------------------------------------------------------


def full_script_params(kind: str, c: LectureConfig) -> dict:
    """Return PyTorch's parameters or gradients as our tree, with zero rows as padding."""
    g = {k.removeprefix(f"{kind}/"): v.astype(float) for k, v in GOLDEN.items() if kind in k}
    unread = set(g)

    def take(name: str, pad: bool = False) -> np.ndarray:
        unread.remove(name)
        rows = c.padded_vocab_size - c.vocab_size if pad else 0
        return np.pad(g[name], [(0, rows)] + [(0, 0)] * (g[name].ndim - 1))

    norm = lambda name: {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}
    linear = lambda name: {"kernel": take(f"{name}.weight").T, "bias": take(f"{name}.bias")}

    def block(name: str) -> dict:
        heads = [f"{name}.heads.{n}" for n in range(c.n_head)]
        parts = "query", "key", "value"
        qkv = [[take(f"{head}.{part}.weight").T for head in heads] for part in parts]
        return {
            "ln_1": norm(f"{name}.ln1"),
            "attn": {"qkv": {"kernel": np.array(qkv).transpose(2, 0, 1, 3)}},
            "ln_2": norm(f"{name}.ln2"),
            "mlp": {"up": linear(f"{name}.ffwd.0"), "down": linear(f"{name}.ffwd.2")},
        }

    tree = {
        "embed": {"kernel": take("tokens.weight", pad=True)},
        "pos_embed": {"kernel": take("positions.weight")},
        "blocks": {i: block(f"blocks.{i}") for i in range(c.n_layer)},
        "ln_f": norm("ln_f"),
        "lm_head": {"kernel": take("lm_head.weight", pad=True)},
        "head_bias": take("lm_head.bias", pad=True),
    }
    assert not unread
    return tree


def small_full_script() -> LectureConfig:
    """Return the full script's config with the sizes of the golden file."""
    sizes = {"vocab_size": 11, "block_size": 8, "n_embd": 16, "batch_size": 4}
    return FULL.replace(**sizes, **EXACT, dropout=0.0, max_iters=20)


def test_full_script_loss_and_gradients_match_pytorch():
    config, tokens = small_full_script(), GOLDEN["tokens"][0]
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, full_script_params("param", config))
        value, grads = loss_and_grads(config, params, tokens[:, :-1], tokens[:, 1:])
    assert float(value) == pytest.approx(GOLDEN["loss"][0], rel=1e-12)
    assert_trees_close(grads, full_script_params("grad", config), atol=1e-7)


@pytest.mark.slow
def test_twenty_full_script_steps_match_pytorch():
    """Losses, gradient norms and final weights are equal; biases and norms also decay."""
    config = small_full_script()
    with jax.enable_x64(True):
        mesh = make_mesh(config)
        step, fresh = make_train_step(config, mesh), init_state(config, mesh)
        params = jax.tree.map(jnp.asarray, full_script_params("param", config))
        state = replace(fresh, params=params)
        for it, windows in enumerate(GOLDEN["tokens"]):
            state, metrics = call_step(step, state, jnp.asarray(windows[None, None], jnp.int32))
            assert float(metrics["loss"][0]) == pytest.approx(GOLDEN["loss"][it], rel=1e-9)
            assert float(metrics["grad_norm"][0]) == pytest.approx(GOLDEN["norm"][it], rel=1e-8)
    assert_trees_close(state.params, full_script_params("final", config), atol=2e-7)


@pytest.mark.parametrize(
    ("keys", "sites"),
    [
        ({}, {"ATTENTION_WEIGHTS", "MLP_OUTPUT"}),
        (
            {"attention_output_proj": True},
            {"ATTENTION_WEIGHTS", "ATTENTION_OUTPUT", "MLP_OUTPUT"},
        ),
        ({"embed_dropout": True}, {"ATTENTION_WEIGHTS", "EMBEDDING", "MLP_OUTPUT"}),
        ({"attention_dropout": False}, {"MLP_OUTPUT"}),
    ],
    ids=["script", "projection", "embedding", "flash"],
)
def test_dropout_acts_at_the_sites_selected_by_the_config(keys, sites, monkeypatch):
    called = set()
    record = lambda self, layer, site: called.add(site)  # returns None, which is no dropout
    monkeypatch.setattr(Dropout, "bind", record)
    config = FULL.replace(vocab_size=11, dtype="float32", attention="reference", **keys)
    graphdef, shapes, _ = model.abstract_model(config)
    run = lambda params: nnx.merge(graphdef, params)(jnp.zeros((1, 8), jnp.int32), Dropout(0.5))
    jax.eval_shape(run, shapes)
    assert called == {getattr(DropoutSite, site) for site in sites}


# ---- the stages ------------------------------------------------------------------------------


def test_lecture_stages_have_expected_names_and_out_dirs():
    assert [path.name[0] for path in STAGES] == ["1", "2", "3", "4", "5", "6", "7", "7", "8"]
    for name, configs in CONFIGS.items():
        assert {config.out_dir for config in configs.values()} == {f"out/lecture/{name}"}
    with_cpu_variant = [name for name, configs in CONFIGS.items() if "cpu_config" in configs]
    assert with_cpu_variant == ["8_dropout_and_scale", "full_script"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_lecture_model_returns_logits_of_expected_shape(name):
    for config in CONFIGS[name].values():
        config = config.replace(vocab_size=65, dtype="float32", attention="reference")
        graphdef, shapes, _ = model.abstract_model(config)
        run = lambda params, graphdef=graphdef: nnx.merge(graphdef, params)(jnp.zeros((2, 8), int))
        assert jax.eval_shape(run, shapes).shape == (2, 8, 128)


# Counts without positions: 65 vectors, a 32 x 65 map with bias, and each stage's additions.
BLOCK = 3 * 32 * 32 + (32 + 1) * 32 + (32 + 1) * 128 + (128 + 1) * 32
PARAMS = {
    "1_bigram": 65 * 32 + 33 * 65,
    "2_positions": 65 * 32 + 33 * 65,
    "3_one_head": 65 * 32 + 33 * 65 + 3 * 32 * 32,
    "4_heads": 65 * 32 + 33 * 65 + 3 * 32 * 32,
    "5_feed_forward": 65 * 32 + 33 * 65 + 3 * 32 * 32 + 2 * 33 * 32,
    "6_residuals": 65 * 32 + 33 * 65 + 3 * BLOCK,
    "7_layer_norm": 65 * 32 + 33 * 65 + 3 * (BLOCK + 4 * 32) + 2 * 32,
    "7_layer_norm_post": 65 * 32 + 33 * 65 + 3 * (BLOCK + 4 * 32),
    "8_dropout_and_scale": 10_788_929 - 256 * 384,  # the number that the lecture's script prints
}


@pytest.mark.parametrize("stage", PARAMS)
def test_lecture_stages_have_expected_parameter_counts(stage):
    config = CONFIGS[stage]["config"].replace(vocab_size=65)
    assert resolve.count_params(config) == PARAMS[stage]


# ---- initialisation of PyTorch's modules -----------------------------------------------------


def test_initial_weights_follow_pytorch_module_defaults():
    """Linear maps are uniform up to 1/sqrt(fan in), with biases; embeddings are standard normal."""
    config = FULL.replace(vocab_size=512, n_embd=64, n_layer=6, block_size=64)
    config = config.replace(attention_output_proj=True, qkv_bias=True)
    params = jax.jit(model.init_params, static_argnums=0)(config, jax.random.key(0))
    for path, value in ref.flatten(params).items():
        value = np.asarray(value)[: config.vocab_size]
        if path.startswith(("embed", "pos_embed")):
            assert value.std() == pytest.approx(1, abs=0.03), path
            assert np.abs(value).max() > 3, path
        elif "ln_" in path:
            assert np.all(value == path.endswith("scale")), path
        else:
            bound = (4 * 64 if "mlp.down" in path else 64) ** -0.5
            assert 0.9 * bound < np.abs(value).max() <= bound, path
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.15), path
