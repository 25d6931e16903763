"""Test that `skip_loss_spikes` skips exactly the steps whose loss or gradient norm is a spike."""

import json
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TEXT,
    all_rows,
    call_step,
    log_of,
    make_data,
    rows_of,
    state_of,
    stop_at,
    take_steps,
    tiny_run,
)
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import spikes, train_step
from jaxgpt.config import Config
from jaxgpt.data.tokenizer import load
from jaxgpt.loss import cross_entropy
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.runtime.metrics import Log
from jaxgpt.train import train
from jaxgpt.train_step import init_state

W = 8
KEYS = {"skip_loss_spikes": 6.0, "spike_window": W}
numbers = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3 * W), st.floats(0.5, 6))
def test_a_spike_is_above_mean_and_deviation_of_the_last_steps(steps, sigmas):
    """The reference keeps the whole history in float64; steps on the border are left out."""
    recent, history = spikes.no_steps(W), np.zeros((2, 0))
    for step in steps:
        loss, norm = jnp.float32(step[0]), jnp.float32(step[1])
        last = history[:, -W:]
        found = bool(spikes.is_spike(recent, loss, norm, sigmas))
        if last.shape[1] < W:
            assert not found
        else:
            above = np.array(step) - last.mean(axis=1) - sigmas * last.std(axis=1)
            if (abs(above) > 1e-3).all():
                assert found == (above > 0).any()
        recent = spikes.remember(recent, loss, norm)
        history = np.concatenate([history, np.array(step)[:, None]], axis=1)


def test_numbers_that_are_not_finite_are_not_remembered():
    recent = spikes.remember(spikes.no_steps(W), jnp.float32(2), jnp.float32(3))
    for loss, norm in (jnp.nan, 1.0), (1.0, jnp.inf):
        after = spikes.remember(recent, jnp.float32(loss), jnp.float32(norm))
        np.testing.assert_array_equal(after, recent)


@pytest.mark.parametrize("window", [2, W, 20])
def test_json_keeps_the_last_steps_exactly(window):
    recent = spikes.no_steps(W)
    assert (spikes.from_json(spikes.to_json(recent), window) == np.inf).all()
    steps = np.random.default_rng(0).normal(size=(2, 11)).astype(np.float32)
    for loss, norm in steps.T:
        recent = spikes.remember(recent, loss, norm)
    text = json.dumps(spikes.to_json(recent), allow_nan=False)
    back = spikes.from_json(json.loads(text), window)
    kept = min(W, window)
    np.testing.assert_array_equal(back[:, -kept:], steps[:, -kept:])
    assert (back[:, :-kept] == np.inf).all()
    assert back.dtype == recent.dtype


def scaled(token: int, factor: float):
    """Return a loss that is `factor` times as large where the targets hold a token."""

    def loss(logits, targets):
        total, count = cross_entropy(logits, targets)
        return total * jnp.where((targets == token).any(), factor, 1.0), count

    return loss


def make_windows(steps: int, spike_at: int) -> np.ndarray:
    """Return windows [steps, 1, 8, 9] of which one holds the token 1."""
    windows = np.random.default_rng(0).integers(4, 20, (steps, 1, 8, 9), np.int32)
    windows[spike_at, 0, 2, 5] = 1
    return windows


def floats(tree) -> list[bytes]:
    return [a.tobytes() for a in jax.tree.leaves(jax.device_get(tree)) if a.dtype.kind == "f"]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """Return a config whose loss is 50 times as large if a target is the token 1."""
    monkeypatch.setattr(train_step, "cross_entropy", scaled(1, 50.0))
    keys = {"vocab_size": 20, "dropout": 0.0, "batch_size": 8, "gradient_accumulation_steps": 1}
    return tiny_run(tmp_path, tmp_path, **keys, **KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2", "fsdp:2"])
def test_a_spike_counts_but_changes_no_weight_and_no_moment(config, mesh):
    devices = make_mesh(config.replace(mesh=mesh))
    step = train_step.make_train_step(config.replace(mesh=mesh), devices)
    state = init_state(config.replace(mesh=mesh), devices)
    for number, windows_MBT in enumerate(make_windows(W + 3, spike_at=W + 1)):
        before = jax.device_get(state)
        state, metrics = call_step(step, state, windows_MBT[None])
        is_spike = number == W + 1
        assert metrics["spike"] == is_spike
        assert state.step == number + 1
        assert (floats(state.params) == floats(before.params)) == is_spike
        assert (floats(state.opt_state) == floats(before.opt_state)) == is_spike


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_no_spike(config, monkeypatch):
    """It would be counted twice."""
    monkeypatch.setattr(train_step, "cross_entropy", scaled(1, jnp.inf))
    _, rows = take_steps(config, make_windows(W + 3, spike_at=W + 1)[:, None])
    assert not np.isfinite(rows[W + 1]["loss"])
    assert not any(row["spike"] for row in rows)


@pytest.mark.slow
def test_a_call_of_several_steps_skips_the_same_step(config):
    windows = make_windows(12, spike_at=10)
    one, one_rows = take_steps(config, windows[:, None])
    three, three_rows = take_steps(config, windows.reshape(4, 3, *windows.shape[1:]))
    assert [bool(row["spike"]) for row in three_rows] == [number == 10 for number in range(12)]
    assert [row["spike"] for row in one_rows] == [row["spike"] for row in three_rows]
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def rare(tmp_path, monkeypatch) -> Config:
    """Return the config of a run whose text has one token with a loss 1,000 times as large."""
    folder = make_data(tmp_path, TEXT[:600] + "!" + TEXT[600:])
    token = int(load(folder / "tale/tokenizer.json").encode("!")[0])
    monkeypatch.setattr(train_step, "cross_entropy", scaled(token, 1_000.0))
    keys = {"max_iters": 60, "lr_decay_iters": 60, "eval_interval": 20, "log_interval": 1}
    return tiny_run(tmp_path / "whole", tmp_path, n_layer=0, **keys, **KEYS)


def test_skipped_steps_are_said_and_counted(rare):
    assert train(rare) == 0
    spikes_seen = [row["step"] for row in all_rows(rare) if row.get("skipped")]
    lines = [line for line in log_of(rare).splitlines() if "; skipped this step" in line]
    assert [int(line.split()[1].rstrip(":")) for line in lines] == spikes_seen
    assert min(spikes_seen) > W
    form = "step {}: the loss is .* and the gradient norm .*; expected at most 6 standard"
    assert re.match(form.format(spikes_seen[0]), lines[0])


@pytest.mark.slow
def test_a_resumed_run_skips_the_same_steps(rare, monkeypatch, tmp_path):
    assert train(rare) == 0
    first = next(row["step"] for row in all_rows(rare) if row.get("skipped"))
    again = rare.replace(out_dir=str(tmp_path / "again"))
    stop_at(monkeypatch, first - 2)
    assert train(again) == 128 + signal.SIGTERM
    assert train(again.replace(init_from="resume")) == 0
    assert rows_of(again) == rows_of(rare)
    assert state_of(again, 60) == state_of(rare, 60)


def test_a_resumed_run_counts_the_skipped_steps_since_the_last_row(rare, monkeypatch, tmp_path):
    """The signal comes with the first skipped step, which the next row has to count."""
    whole = rare.replace(log_interval=20)
    assert train(whole) == 0
    info, said = Log.info, []

    def stop_at_spike(self, text):
        info(self, text)
        if "; skipped this step" in text and not said:
            said.append(text)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "info", stop_at_spike)
    again = whole.replace(out_dir=str(tmp_path / "again"))
    assert train(again) == 128 + signal.SIGTERM
    assert train(again.replace(init_from="resume")) == 0
    assert rows_of(again) == rows_of(whole)


def test_a_run_that_stops_before_its_window_is_full_is_saved(rare, monkeypatch):
    config = rare.replace(spike_window=64)  # more steps than the run has
    stop_at(monkeypatch, 3)
    assert train(config) == 128 + signal.SIGTERM
    assert run_dir.open_checkpoints(config).latest() == rows_of(config)[-1]["step"]


def test_a_run_without_the_key_resumes_with_it(rare, tmp_path):
    plain = rare.replace(out_dir=str(tmp_path / "plain"), skip_loss_spikes=0.0, max_iters=20)
    assert train(plain) == 0
    assert "skipped" not in all_rows(plain)[-2]
    assert train(rare.replace(out_dir=plain.out_dir, init_from="resume")) == 0
    assert max(row["step"] for row in all_rows(plain) if row.get("skipped")) > 20 + W
