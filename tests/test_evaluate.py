"""Test estimates of the losses against NumPy, on windows that are counted by hand."""

import jax
import numpy as np
import pytest
from helpers import all_rows, make_data, tiny_run
from reference import numpy_gpt as ref

from jaxgpt.data.order import window_starts
from jaxgpt.data.tokens import open_dataset
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.train import train
from jaxgpt.train_step import init_state

TEXT = "ab" * 900 + "cd" * 100  # the last tenth is the validation split
BATCHES = 25  # more than one call evaluates


@pytest.mark.parametrize("mesh", ["data:1", "data:4"])
def test_estimates_are_mean_losses_of_the_next_windows_of_each_stream(tmp_path, mesh):
    """With a learning rate of 0 both evaluations have the initial weights."""
    make_data(tmp_path, TEXT)
    keys = {"n_layer": 0, "dropout": 0.0, "eval_iters": BATCHES, "max_iters": 8, "mesh": mesh}
    config = tiny_run(tmp_path / "run", tmp_path, **keys, learning_rate=0.0, decay_lr=False)
    train(config)
    config = run_dir.load_config(config.out_dir)
    params = jax.device_get(init_state(config, local_mesh()).params)
    data = open_dataset(tmp_path / "tale", tmp_path, config.block_size)
    found = [row for row in all_rows(config) if "val_loss" in row]
    assert [row["step"] for row in found] == [0, 8]
    count = BATCHES * config.batch_size
    for row in found:
        for stream, (name, split) in enumerate([("train", data.train), ("val", data.val)], 1):
            ids = split.read(0, len(split))
            sample_ids = np.arange(row["step"] * count, (row["step"] + 1) * count)
            keys = {"block_size": config.block_size, "seed": config.seed, "stream": stream}
            starts = window_starts(sample_ids, num_tokens=len(ids), **keys)
            windows = ids[starts[:, None] + np.arange(config.block_size + 1)]
            loss = ref.forward(params, windows[:, :-1], config, windows[:, 1:])[1]
            assert row[f"{name}_loss"] == pytest.approx(loss, abs=1e-5)
    losses = {round(row[key], 4) for row in found for key in ("train_loss", "val_loss")}
    assert len(losses) > 2  # the splits, and the windows of the two steps, differ
