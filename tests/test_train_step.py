"""The training step: against PyTorch, against itself in other shapes, and what it compiles to."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference import numpy_gpt as ref
from reference.gpt2 import Golden

from jaxgpt import sharding
from jaxgpt.config import Config
from jaxgpt.train_step import abstract_state, init_state, make_eval_step, make_train_step

TINY = {
    "vocab_size": 31,
    "block_size": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "warmup_iters": 2,
    "max_iters": 20,
    "dtype": "float32",
    "attention": "reference",
    "mesh": "data:1",
}


def make_config(**options) -> Config:
    return Config(**TINY | options)


def make_batch(config: Config, *, steps: int = 1, micro: int = 2, seed: int = 0) -> jax.Array:
    """Random windows for `steps` steps of 8 sequences in `micro` micro-batches."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, config.vocab_size, (steps, 8, config.block_size + 1))
    return jnp.asarray(windows.reshape(steps, micro, 8 // micro, -1), jnp.int32)


def train(config: Config, batches: list[jax.Array]) -> tuple[dict, list[dict]]:
    mesh = sharding.make_mesh(config)
    state, step, rows = init_state(config, mesh), make_train_step(config, mesh), []
    for batch in batches:
        state, metrics = step(state, batch, jnp.int32(len(batch)))
        metrics = jax.device_get(metrics)
        rows += [{k: v[i] for k, v in metrics.items()} for i in range(len(batch))]
    return jax.device_get(state), rows


def assert_trees_close(ours: dict, theirs: dict, atol: float) -> None:
    theirs = ref.flatten(theirs)
    for path, value in ref.flatten(ours).items():
        np.testing.assert_allclose(value, theirs.pop(path), rtol=0, atol=atol, err_msg=path)
    assert not theirs


# ---- against PyTorch -------------------------------------------------------------------------


def test_twenty_steps_from_the_same_weights_are_pytorchs():
    """Hugging Face's GPT-2 under torch.optim.AdamW: losses, gradient norms, rates and weights."""
    golden = Golden(Path(__file__).parent / "golden" / "gpt2_tiny.npz")
    arrays, options = golden.arrays, {"dtype": "float64", "gradient_accumulation_steps": 1}
    config = make_config(**golden.sizes | golden.hyper | options, mlp="gelu_tanh")
    targets = np.where(arrays["targets"] < 0, ~1, arrays["targets"])
    text = np.concatenate([arrays["tokens"], targets[..., -1:]], axis=-1)
    windows = np.where(
        np.pad(arrays["targets"], [(0, 0), (0, 0), (1, 0)]) < 0, -1 - np.abs(text), text
    )
    with jax.enable_x64(True):
        mesh = sharding.make_mesh(config)
        state, step = init_state(config, mesh), make_train_step(config, mesh)
        state["params"] = jax.tree.map(jnp.asarray, golden.params("param"))
        for it in range(len(windows)):
            batch = jnp.asarray(windows[it][None, None], jnp.int32)
            state, metrics = step(state, batch, jnp.int32(1))
            for ours, theirs in ("loss", "loss"), ("grad_norm", "norm"), ("lr", "lr"):
                want = arrays[f"train/{theirs}"][it]
                assert float(metrics[ours][0]) == pytest.approx(want, rel=1e-6), (it, ours)
    assert_trees_close(state["params"], golden.params("final"), atol=1e-6)


# ---- against itself in other shapes ----------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"scan_layers": True}], ids=str)
def test_accumulation_is_the_big_batch(options):
    """Also with dropout: a sequence's masks belong to it, and not to its micro-batch."""
    config = make_config(**options, learning_rate=1e-3)
    want, rows = train(config, [make_batch(config, micro=1, seed=i) for i in range(3)])
    for micro in (2, 8):
        got, other = train(config, [make_batch(config, micro=micro, seed=i) for i in range(3)])
        assert [row["loss"] for row in other] == pytest.approx(
            [row["loss"] for row in rows], rel=1e-5
        )
        assert_trees_close(got["params"], want["params"], atol=1e-5)


def test_the_mean_is_over_all_targets_of_a_step_not_over_micro_batches():
    """Micro-batches with different numbers of ignored targets weigh by their targets."""
    config = make_config()
    whole = make_batch(config, micro=1)
    masked = whole.at[0, 0, :3, 2:].set(~whole[0, 0, :3, 2:])
    _, want = train(config, [masked])
    _, got = train(config, [masked.reshape(1, 4, 2, -1)])
    assert got[0]["loss"] == pytest.approx(want[0]["loss"], rel=1e-6)
    assert got[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=1e-5)


def test_a_masked_target_is_still_read():
    """~id hides a token as a target, not as an input."""
    config = make_config()
    batch = make_batch(config, micro=1)
    masked = batch.at[..., 4].set(~batch[..., 4])
    other = masked.at[..., 4].set(~((batch[..., 4] + 1) % 31))
    losses = [train(config, [b])[1][0]["loss"] for b in (batch, masked, other)]
    assert len({round(float(loss), 6) for loss in losses}) == 3


def test_several_steps_a_dispatch_are_single_steps():
    config = make_config(dropout=0.1)
    batches = [make_batch(config, seed=i) for i in range(6)]
    want, rows = train(config, batches)
    joined = [jnp.concatenate(batches[i : i + 3]) for i in (0, 3)]
    got, other = train(config, joined)
    assert_trees_close(got["params"], want["params"], atol=1e-6)
    for a, b in zip(rows, other, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_dispatch_may_end_early():
    config = make_config()
    batch = make_batch(config, steps=5)
    mesh = sharding.make_mesh(config)
    step = make_train_step(config, mesh)
    state, _ = step(init_state(config, mesh), batch, jnp.int32(2))
    want, _ = train(config, [batch[i : i + 1] for i in range(2)])
    assert int(state["step"]) == 2
    assert_trees_close(jax.device_get(state)["params"], want["params"], atol=1e-6)


@pytest.mark.parametrize("mesh", ["data:2", "data:2,fsdp:2", "fsdp:2,tensor:2"])
def test_a_mesh_changes_nothing_but_rounding(mesh):
    config = make_config(dropout=0.1, learning_rate=1e-3)
    batches = [make_batch(config, micro=2, seed=i) for i in range(3)]
    want, rows = train(config, batches)
    got, other = train(config.replace(mesh=mesh), batches)
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in rows], rel=1e-5)
    assert_trees_close(got["params"], want["params"], atol=1e-5)


def test_the_loss_falls_on_a_text_that_repeats():
    config = make_config(max_iters=100)
    text = np.tile(np.arange(9) % 7, 8).reshape(1, 1, 8, 9)
    _, rows = train(config, [jnp.asarray(text, jnp.int32)] * 100)
    assert rows[0]["loss"] > 3
    assert rows[-1]["loss"] < 0.1


def test_evaluation_is_the_training_loss_without_dropout():
    config = make_config(dropout=0.0)
    batch = make_batch(config, micro=1)
    mesh = sharding.make_mesh(config)
    params = init_state(config, mesh)["params"]
    total, count = make_eval_step(config, mesh)(params, batch, jnp.int32(1))
    _, rows = train(config, [batch])
    assert float(total) / int(count) == pytest.approx(rows[0]["loss"], rel=1e-6)
    with_dropout = make_eval_step(config.replace(dropout=0.5), mesh)
    assert float(with_dropout(params, batch, jnp.int32(1))[0]) == float(total)


# ---- what it compiles to ---------------------------------------------------------------------


def test_the_state_is_donated_and_nothing_compiles_again_or_leaves_the_device():
    config = make_config(dropout=0.1)
    mesh = sharding.make_mesh(config)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    batches = [make_batch(config, seed=i) for i in range(4)]
    one = jax.device_put(np.int32(1))
    for batch in batches:
        old = jax.tree.leaves(state["params"])
        with jax.transfer_guard("disallow"):
            state, _ = step(state, batch, one)
        assert all(array.is_deleted() for array in old)
    assert step._cache_size() == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_is_born_as_it_is_promised(optimizer):
    config = make_config(mesh="fsdp:2,tensor:2", optimizer=optimizer)
    mesh = sharding.make_mesh(config)
    promised, born = abstract_state(config, mesh), init_state(config, mesh)
    assert jax.tree.structure(promised) == jax.tree.structure(born)
    for want, got in zip(jax.tree.leaves(promised), jax.tree.leaves(born), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    state = born["opt_state"][1][0]
    if optimizer == "muon":
        state = state.inner_states["muon"].inner_state[0]
    moments = state.mu["blocks"][0]["attn"]["qkv"]["kernel"]
    assert moments.sharding.spec == PartitionSpec("fsdp", None, "tensor", None)


def test_seeds_differ_and_repeat():
    config = make_config()
    embed = lambda seed: train(config.replace(seed=seed), [])[0]["params"]["embed"]["kernel"]
    np.testing.assert_array_equal(embed(1), embed(1))
    assert not np.allclose(embed(1), embed(2))
