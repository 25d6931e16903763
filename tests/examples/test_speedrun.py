"""Test the speedrun's model: its parts, its window phases, and its training on a mesh."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, make_data, rows_of, stop_at
from reference import numpy_gpt as ref

from examples.speedrun.model import SpeedrunConfig
from jaxgpt import model
from jaxgpt.config import UserError
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.train import train
from jaxgpt.train_step import cast_weights

SIZES = {
    "vocab_size": 11, "block_size": 8, "n_layer": 4, "n_head": 2, "n_embd": 16, "dtype": "float32",
    "attention": "reference",
}  # fmt: skip
MORE_PARTS = {
    "zero_init_projections": True, "logit_softcap": 15.0, "value_embeddings": 2,
    "embedding_shortcut": True, "unet_skips": True,
}  # fmt: skip


def init(**keys) -> tuple[SpeedrunConfig, dict]:
    config = SpeedrunConfig(**SIZES | MORE_PARTS | keys)
    return config, model.init_params(config, jax.random.key(0))


def keystr(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def logits(config: SpeedrunConfig, params: dict, tokens_BT: np.ndarray) -> np.ndarray:
    graphdef = model.abstract_model(config)[0]
    return np.asarray(nnx.merge(graphdef, params)(jnp.asarray(tokens_BT)))[..., :11]


def perturbed(params: dict) -> dict:
    """Return parameters of which none is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)


TOKENS_BT = np.random.default_rng(1).integers(0, 11, (2, 8))


TRAINING = {"optimizer", "muon_polynomial", "muon_per_head", "lr_schedule", "embedding_lr_scale"}
MODEL_PARTS = {n: k for n, k in SpeedrunConfig.parts.items() if not k.keys() & TRAINING}
SHAPES = [
    {"sliding_window": 3},
    {"n_layer": 5, "value_embeddings": 2},
    {"n_layer": 1, "value_embeddings": 0},
]


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, *SHAPES, *MODEL_PARTS.values()], ids=str)
def test_logits_do_not_depend_on_later_tokens(keys):
    config, params = init(**keys)
    params = perturbed(params)
    other_BT = TOKENS_BT.copy()
    other_BT[:, 5:] = (other_BT[:, 5:] + 1) % 11
    ours, others = logits(config, params, TOKENS_BT), logits(config, params, other_BT)
    np.testing.assert_allclose(ours[:, :5], others[:, :5], atol=1e-5)
    assert not np.allclose(ours[:, 5:], others[:, 5:])


@pytest.mark.parametrize("name", MODEL_PARTS)
def test_each_part_changes_the_function_of_the_model(name):
    """Without the part, the same weights give other logits, or weights that act are missing."""
    config, params = init()
    other, others = init(**MODEL_PARTS[name])
    if name == "zero-initialised projections":
        for branch, layer in ("attn", "out"), ("mlp", "down"):
            assert not np.any(params["blocks"][0][branch][layer]["kernel"])
            assert np.any(others["blocks"][0][branch][layer]["kernel"])
        assert not np.any(params["lm_head"]["kernel"])
        return
    ours, theirs = ref.flatten(perturbed(params)), ref.flatten(others)
    if ours.keys() == theirs.keys():
        params = perturbed(params)
        with_part, without = logits(config, params, TOKENS_BT), logits(other, params, TOKENS_BT)
        assert not np.allclose(with_part, without, atol=1e-4)
    if len(theirs) > len(ours):
        config, params, theirs = other, others, ours
    for path in ref.flatten(params).keys() - theirs.keys():
        start = perturbed(params)
        changed = jax.tree.map_with_path(
            lambda keys, p, path=path: p + 0.5 * (keystr(keys) == path), start
        )
        before, after = logits(config, start, TOKENS_BT), logits(config, changed, TOKENS_BT)
        assert not np.allclose(before, after, atol=1e-5), path


def test_tables_of_values_stay_in_float32_in_training():
    _, params = init()
    cast = cast_weights(params, "bfloat16")
    assert cast["embed"]["values"][0]["kernel"].dtype == jnp.float32
    assert cast["lm_head"]["kernel"].dtype == jnp.bfloat16


def test_first_logits_are_uniform():
    config, params = init()
    np.testing.assert_array_equal(logits(config, params, TOKENS_BT), 0)


def test_too_many_value_embeddings_are_rejected():
    message = "^value_embeddings=3: too many tables; expected at most 2 "
    with pytest.raises(UserError, match=message):
        init(value_embeddings=3)


def test_a_key_that_the_model_does_not_have_is_rejected():
    problem = "bias=True: the speedrun's model does not have this key"
    with pytest.raises(UserError, match=f"^{problem}; expected False; try bias=False$"):
        init(bias=True)


def test_windows_grow_to_the_whole_context_in_equal_phases():
    config = SpeedrunConfig(**SIZES, max_iters=90, first_window=2)
    windows = {step: phase.sliding_window for step, phase in config.phases().items()}
    assert windows == {0: 2, 30: 5, 60: 0}
    assert config.replace(first_window=0).phases() == {0: config.replace(first_window=0)}
    with pytest.raises(UserError, match=r"^first_window=9: larger than the last window; expected"):
        config.replace(first_window=9)


def run(folder, **keys) -> run_dir.Config:
    """Train a few steps on a small text; return the config of the run."""
    config = SpeedrunConfig(
        **SIZES | MORE_PARTS | {"vocab_size": 0},
        data_dir=str(folder / "data"), dataset="tale", batch_size=4,
        gradient_accumulation_steps=1, max_iters=6, eval_interval=100, eval_iters=1, warmup_iters=2,
        optimizer="normuon", learning_rate=1e-2, min_lr=1e-3, log_interval=1, steps_per_call=10,
        **keys,
    )  # fmt: skip
    assert train(config) == 0
    return config


def losses(config: run_dir.Config) -> list[float]:
    return [row["loss"] for row in rows_of(config) if "loss" in row]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data")
    return tmp_path


@pytest.mark.slow
def test_training_is_equal_on_a_mesh(folder):
    alone = run(folder, out_dir=str(folder / "one"), mesh="data:1")
    for mesh in "data:2,fsdp:2", "data:2,fsdp:2,tensor:2":
        others = run(folder, out_dir=str(folder / mesh), mesh=mesh)
        np.testing.assert_allclose(losses(others), losses(alone), atol=1e-4)


@pytest.mark.slow
def test_a_run_in_phases_resumes_as_if_it_had_not_stopped(folder, monkeypatch):
    keys = {"first_window": 2, "window_sizes": 2, "mesh": "data:1"}
    whole = run(folder, out_dir=str(folder / "whole"), **keys)
    one_window = run(folder, out_dir=str(folder / "one"), mesh="data:1", sliding_window=2)
    assert losses(one_window)[:3] == losses(whole)[:3]
    assert losses(one_window)[3:] != losses(whole)[3:]

    stop_at(monkeypatch, 4)
    parts = whole.replace(out_dir=str(folder / "parts"))
    assert train(parts) == 128 + signal.SIGTERM
    assert train(parts.replace(init_from="resume")) == 0
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("file", ["speedrun", "speedrun_gpt2", "ablate_speedrun"])
def test_config_files_build(file):
    for config in load_config_file(str(ROOT / "configs" / f"{file}.py")).values():
        model.abstract_model(config.replace(vocab_size=65))
