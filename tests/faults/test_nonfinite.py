"""Test that a nonfinite loss or gradient never reaches the weights."""

import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TEXT, call_step, log_of, make_data, refusal, set_val_losses, state_of

from jaxgpt import train_step
from jaxgpt.data.tokenizer import load
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.train import train
from jaxgpt.train_step import init_state, make_train_step

from .harness import tiny

cross_entropy = train_step.cross_entropy


@jax.custom_vjp
def spoil(x, is_bad):
    """Return x, with a gradient of NaN where `is_bad`."""
    return x


spoil.defvjp(
    lambda x, is_bad: (x, is_bad), lambda is_bad, g: (g * jnp.where(is_bad, jnp.nan, 1.0), None)
)


def poisoned(tokens: dict[str, int]):
    """Return a loss with a nonfinite value or gradient where the targets hold a kind's token."""

    def loss(logits, targets):
        total, count = cross_entropy(logits, targets)
        for kind, token in tokens.items():
            is_bad = (targets == token).any()
            if kind == "gradient":
                total = spoil(total, is_bad)
            else:
                total += jnp.where(is_bad, float(kind), 0.0)
        return total, count

    return loss


SMALL = {"n_layer": 0, "dropout": 0.0, "batch_size": 8, "gradient_accumulation_steps": 1}
CASES = [
    ("data:2", 3, SMALL),
    ("fsdp:2", 1, SMALL),
    pytest.param("data:2", 1, {}, marks=pytest.mark.slow),
    pytest.param("fsdp:2", 3, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mesh", "U", "keys"), CASES)
def test_nonfinite_step_leaves_weights_and_moments_unchanged(tmp_path, monkeypatch, mesh, U, keys):
    kinds = {"nan": 1, "inf": 2, "gradient": 3}
    monkeypatch.setattr(train_step, "cross_entropy", poisoned(kinds))
    config = tiny(tmp_path, tmp_path, vocab_size=20, mesh=mesh, **keys)
    devices = make_mesh(config)
    step = make_train_step(config, devices)
    good = np.random.default_rng(0).integers(4, 20, (U, 2, 4, 9), np.int32)
    state, _ = call_step(step, init_state(config, devices), good)
    floats = lambda tree: [a for a in jax.tree.leaves(tree) if a.dtype.kind == "f"]
    for kind, token in kinds.items():
        before = jax.device_get(state)
        bad = good.copy()
        bad[:, 1, 2, 5] = token
        state, metrics = call_step(step, state, bad)
        after = jax.device_get(state)
        assert after.step == before.step + U
        for name, is_bad in ("loss", kind != "gradient"), ("grad_norm", kind == "gradient"):
            assert (np.isfinite(metrics[name]) == (not is_bad)).all(), (kind, name)
        assert len(floats(after)) >= 6
        for ours, theirs in zip(floats(after), floats(before), strict=True):
            assert ours.tobytes() == theirs.tobytes(), kind
        state, metrics = call_step(step, state, good)
        assert np.isfinite(metrics["loss"]).all()
        moved = floats(jax.device_get(state).params)
        assert any((a != b).any() for a, b in zip(moved, floats(after.params), strict=True))


@pytest.fixture
def rare(tmp_path, monkeypatch):
    """Return the config of a run whose text holds the NaN token once."""
    folder = make_data(tmp_path, TEXT[:600] + "!" + TEXT[600:])
    token = int(load(folder / "tale/tokenizer.json").encode("!")[0])
    monkeypatch.setattr(train_step, "cross_entropy", poisoned({"nan": token}))
    keys = {"max_iters": 60, "eval_interval": 30, "eval_iters": 1, "mesh": "data:1"}
    return tiny(tmp_path, tmp_path, **keys | SMALL)


def is_finite(config) -> bool:
    """Return whether the newest checkpoint is finite."""
    checkpoints = run_dir.open_checkpoints(config)
    deadline = time.monotonic() + 60
    while not checkpoints.steps() and time.monotonic() < deadline:
        time.sleep(0.05)  # the last save may still be on its way
    arrays = state_of(config, checkpoints.steps()[-1]).values()
    return all(np.isfinite(np.frombuffer(array, "f4")).all() for array in arrays)


def strict_rows(config) -> list[dict]:
    def refuse(word):
        raise AssertionError(word)

    lines = Path(config.out_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_nonfinite_loss_ends_the_run_and_saved_state_is_finite(rare):
    message = refusal(train, rare)
    for part in "step ", "loss is nan", "gradient norm", "learning_rate", "max_nonfinite_steps":
        assert part in message
    assert is_finite(rare)


def test_nonfinite_steps_are_skipped_and_counted_if_allowed(rare):
    config = rare.replace(max_nonfinite_steps=2, log_interval=2)
    assert train(config) == 0
    assert is_finite(config)
    rows = [row for row in strict_rows(config) if "skipped" in row]
    said = log_of(config).count("; skipped this step")
    assert sum(row["skipped"] for row in rows) == said > 0
    assert math.isfinite(rows[-1]["lr"])


def test_exceeding_max_nonfinite_steps_ends_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "cross_entropy", poisoned({"inf": 1}))  # the space
    config = tiny(tmp_path, data, max_nonfinite_steps=3, mesh="data:1", **SMALL)
    assert "step 4: the loss is inf" in refusal(train, config)
    assert log_of(config).count("; skipped this step") == 3
    assert is_finite(config)
    assert [row["loss"] for row in strict_rows(config) if "loss" in row] == [None] * 3


def test_overflowing_update_ends_the_run_without_saving_nonfinite_weights(data, tmp_path):
    """The step is near float32's maximum, so that the decay of some weights overflows."""
    keys = {"learning_rate": 3.4e38, "weight_decay": 1.0, "warmup_iters": 0, "save_interval": 1}
    config = tiny(tmp_path, data, mesh="data:1", **keys | SMALL)
    assert refusal(train, config).startswith("step 1: a weight or moment is not finite")
    assert run_dir.open_checkpoints(config).steps() == []


def test_nan_val_loss_is_null_in_metrics_and_never_best(data, tmp_path, monkeypatch):
    set_val_losses(monkeypatch, {0: 2.0, 8: math.nan, 16: 1.0, 24: math.nan})
    config = tiny(tmp_path, data, mesh="data:1", **SMALL)
    assert train(config) == 0
    rows = [row["val_loss"] for row in strict_rows(config) if "val_loss" in row]
    assert rows == [2.0, None, 1.0, None]
    assert run_dir.open_checkpoints(config).best() == 16
