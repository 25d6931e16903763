"""Test the training step against PyTorch, in other batch shapes, and as compiled."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_trees_close,
    call_step,
    make_config,
    make_windows,
    take_steps,
)
from jax.sharding import PartitionSpec
from reference.gpt2 import Golden

from jaxgpt.kernels import TABLE
from jaxgpt.kernels.norm import fold_gains, folds_gains_gpu, residual_and_norm_gpu
from jaxgpt.model import init_params
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.train_step import abstract_state, init_state, make_eval_step, make_train_step

# ---- against PyTorch -------------------------------------------------------------------------


def test_twenty_training_steps_match_pytorch():
    """Losses, norms, rates and weights equal Hugging Face's GPT-2 under torch.optim.AdamW."""
    golden = Golden(Path(__file__).parent / "golden" / "gpt2_tiny.npz")
    arrays, options = golden.arrays, {"dtype": "float64", "gradient_accumulation_steps": 1}
    config = make_config(**golden.sizes | golden.hyper | options, mlp="gelu_tanh")
    targets = np.where(arrays["targets"] < 0, ~1, arrays["targets"])
    text = np.concatenate([arrays["tokens"], targets[..., -1:]], axis=-1)
    windows = np.where(
        np.pad(arrays["targets"], [(0, 0), (0, 0), (1, 0)]) < 0, -1 - np.abs(text), text
    )
    with jax.enable_x64(True):
        mesh = make_mesh(config)
        state, step = init_state(config, mesh), make_train_step(config, mesh)
        params = jax.tree.map(jnp.asarray, golden.params("param"))
        state = replace(state, params=params)
        for it in range(len(windows)):
            batch = jnp.asarray(windows[it][None, None], jnp.int32)
            state, metrics = call_step(step, state, batch)
            for ours, theirs in ("loss", "loss"), ("grad_norm", "norm"), ("lr", "lr"):
                want = arrays[f"train/{theirs}"][it]
                assert float(metrics[ours][0]) == pytest.approx(want, rel=1e-6), (it, ours)
    assert_trees_close(state.params, golden.params("final"), atol=1e-6)


# ---- gains folded into linear maps -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2},
        {"norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1, "qk_norm": True},
        {"scan_layers": True, "tie_embeddings": False},
        {"mesh": "data:2", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_folding_gains_changes_no_training_step(options, monkeypatch):
    """The gains are trained too, so that they differ from 1 after the first step."""
    config = make_config(**options, bias=False, learning_rate=0.01)
    batches = [make_windows(config, seed=i) for i in range(4)]
    want = take_steps(config, batches)
    monkeypatch.setitem(TABLE, ("folds_gains", "cpu"), folds_gains_gpu)
    monkeypatch.setitem(TABLE, ("residual_and_norm", "cpu"), residual_and_norm_gpu)
    got = take_steps(config, batches)
    gain = want[0].params["ln_f"]["scale"]
    assert np.abs(np.asarray(gain) - 1).max() > 0.01
    assert_same(got, want, atol=2e-4)


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"freeze": "ln_1"}, {"norm_position": "post"}, {"n_layer": 0}]
)
def test_gains_are_not_folded_where_this_would_change_the_model(options):
    assert folds_gains_gpu(make_config(bias=False))
    assert not folds_gains_gpu(make_config(**{"bias": False} | options))


def test_a_map_that_the_folding_does_not_know_is_refused():
    """A fork that adds a map after a norm would otherwise train without the norm's gain."""
    config = make_config(bias=False, tie_embeddings=False)
    params = init_params(config, jax.random.key(0))
    params["blocks"][1]["mlp"]["router"] = {"kernel": jnp.ones((config.n_embd, 4))}
    with pytest.raises(ValueError, match=r"^'router': is not known"):
        fold_gains(params)


# ---- equal results in other batch shapes -----------------------------------------------------


def assert_same(ours: tuple, theirs: tuple, atol: float) -> None:
    """Compare the parameters after some steps, and the metrics of each."""
    for got, want in zip(ours[1], theirs[1], strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    assert_trees_close(ours[0].params, theirs[0].params, atol)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"scan_layers": True}], ids=str)
def test_gradient_accumulation_equals_one_large_batch(options):
    """Dropout masks belong to a sequence and not to a micro-batch."""
    config = make_config(**options, learning_rate=1e-3)
    want, *others = (
        take_steps(config, [make_windows(config, micro=micro, seed=i) for i in range(3)])
        for micro in (1, 2, 8)
    )
    for other in others:
        assert_same(other, want, atol=1e-5)


@pytest.mark.slow
def test_loss_is_the_mean_over_all_targets_of_a_step():
    """Micro-batches are weighted by their numbers of targets that are not ignored."""
    config = make_config(learning_rate=1e-3)
    whole = make_windows(config, micro=1)
    masked = whole.at[0, 0, :3, 2:].set(~whole[0, 0, :3, 2:])
    want = take_steps(config, [masked])
    assert_same(take_steps(config, [masked.reshape(1, 4, 2, -1)]), want, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"skip_loss_spikes": 6.0}], ids=str)
def test_step_without_targets_changes_only_the_count_of_steps(options):
    config = make_config(**options)
    batch = make_windows(config)
    before, _ = take_steps(config, [batch])
    after, rows = take_steps(config, [batch, ~batch])
    assert rows[1]["loss"] == 0
    assert int(after.step) == 2
    kept = lambda state: (state.params, state.opt_state[1][0], state.recent_2W)  # [1][0]: moments
    jax.tree.map(np.testing.assert_array_equal, kept(after), kept(before))


@pytest.mark.slow
def test_masked_token_is_still_an_input():
    """~id hides a token as a target, not as an input."""
    config = make_config()
    batch = make_windows(config, micro=1)
    masked = batch.at[..., 4].set(~batch[..., 4])
    other = masked.at[..., 4].set(~((batch[..., 4] + 1) % 31))
    losses = [take_steps(config, [b])[1][0]["loss"] for b in (batch, masked, other)]
    assert len({round(float(loss), 6) for loss in losses}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mesh": "data:2,fsdp:2", "shard_optimizer": True}])
def test_several_steps_per_call_equal_single_steps(options):
    config = make_config(dropout=0.1, **options)
    batches = [make_windows(config, seed=i) for i in range(6)]
    joined = [jnp.concatenate(batches[i : i + 3]) for i in (0, 3)]
    assert_same(take_steps(config, joined), take_steps(config, batches), atol=1e-6)


@pytest.mark.slow
def test_call_takes_only_the_requested_number_of_steps():
    config = make_config()
    batch = make_windows(config, steps=5)
    mesh = make_mesh(config)
    step = make_train_step(config, mesh)
    state, _ = step(init_state(config, mesh), batch, jnp.int32(2))
    want, _ = take_steps(config, [batch[i : i + 1] for i in range(2)])
    assert int(state.step) == 2
    assert_trees_close(jax.device_get(state).params, want.params, atol=1e-6)


def test_evaluation_equals_training_loss_without_dropout():
    config = make_config(dropout=0.0)
    batch = make_windows(config, micro=1)
    mesh = make_mesh(config)
    params = init_state(config, mesh).params
    total, count = make_eval_step(config, mesh)(params, batch, jnp.int32(1))
    _, rows = take_steps(config, [batch])
    assert float(total) / int(count) == pytest.approx(rows[0]["loss"], rel=1e-6)
    with_dropout = make_eval_step(config.replace(dropout=0.5), mesh)
    assert float(with_dropout(params, batch, jnp.int32(1))[0]) == float(total)


# ---- the compiled step -----------------------------------------------------------------------


def test_state_is_donated_and_step_compiles_once_without_host_transfers():
    config = make_config(dropout=0.1)
    mesh = make_mesh(config)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    batches = [make_windows(config, seed=i) for i in range(4)]
    one = jax.device_put(np.int32(1))
    for batch in batches:
        old = jax.tree.leaves(state.params)
        with jax.transfer_guard("disallow"):
            state, _ = step(state, batch, one)
        assert all(array.is_deleted() for array in old)
    assert step._cache_size() == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_initial_state_matches_the_abstract_state(optimizer):
    config = make_config(mesh="fsdp:2,tensor:2", optimizer=optimizer)
    mesh = make_mesh(config)
    promised, born = abstract_state(config, mesh), init_state(config, mesh)
    assert jax.tree.structure(promised) == jax.tree.structure(born)
    for want, got in zip(jax.tree.leaves(promised), jax.tree.leaves(born), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    state = born.opt_state[1][0]
    if optimizer == "muon":
        state = state.inner_states["muon"].inner_state[0]
    moments = state.mu["blocks"][0]["attn"]["qkv"]["kernel"]
    assert moments.sharding.spec == PartitionSpec("fsdp", None, "tensor", None)


def test_initial_weights_are_reproducible_and_depend_on_the_seed():
    config = make_config()
    embed = lambda seed: take_steps(config.replace(seed=seed), [])[0].params["embed"]["kernel"]
    np.testing.assert_array_equal(embed(1), embed(1))
    assert not np.allclose(embed(1), embed(2))
