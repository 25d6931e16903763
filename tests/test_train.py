"""Whole runs: the run directory, and that stopping and going on changes not a digit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import numpy_gpt as ref

from jaxgpt import sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import prepare
from jaxgpt.evaluate import evaluate
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.metrics import Log, read_metrics
from jaxgpt.train import train

TEXT = "It is a tale told by an idiot, full of sound and fury, signifying nothing.\n" * 40


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "tale.txt").write_text(TEXT)
    prepare(str(folder / "tale.txt"), str(folder))
    return folder


@pytest.fixture
def make_config(data_dir, tmp_path):
    def make(name: str = "run", **options) -> Config:
        keys = {
            "out_dir": str(tmp_path / name),
            "data_dir": str(data_dir),
            "dataset": "tale",
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 16,
            "block_size": 8,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "dropout": 0.2,
            "learning_rate": 1e-2,
            "warmup_iters": 3,
            "max_iters": 24,
            "lr_decay_iters": 24,
            "eval_interval": 8,
            "eval_iters": 3,
            "mesh": "data:2",
        }
        return Config(**keys | options)

    return make


def rows_of(config: Config) -> list[dict]:
    """The metrics, without what a clock says."""
    clock = ("tokens_per_s", "step_ms", "mfu", "time")
    rows = read_metrics(Path(config.out_dir, "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def state_of(config: Config, step: int) -> dict:
    """Parameters of a checkpoint, and the bytes of its optimizer's arrays."""
    folder = Path(config.out_dir, "checkpoints", str(step))
    config = run_dir.load_config(config.out_dir)
    params, _ = run_dir.load_params(config, str(step), sharding.local_mesh())
    assert folder.is_dir()
    return ref.flatten(jax.device_get(params))


def stop_at(monkeypatch, *steps: int) -> None:
    """SIGTERM arrives while these steps are logged, once each."""
    left, log = list(steps), Log.train

    def train(self, row, left_s):
        log(self, row, left_s)
        if left and row["step"] == left[0]:
            signal.raise_signal(signal.SIGTERM)
            left.pop(0)

    monkeypatch.setattr(Log, "train", train)


def test_a_run_leaves_what_the_contract_says(make_config):
    config = make_config()
    assert train(config, {}) == 0
    folder = Path(config.out_dir)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "log.txt",
        "tokenizer.json",
        "checkpoints",
        ".lock",
    }
    assert json.loads((folder / "config.json").read_text())["n_embd"] == 16
    steps = {path.name for path in (folder / "checkpoints").iterdir()}
    assert steps >= {"16", "24", "best"}
    assert {p.name for p in (folder / "checkpoints/24").iterdir()} == {
        "state",
        "meta.json",
        "digest.json",
    }
    rows = read_metrics(folder / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 25))
    assert set(training[0]) == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "step_ms",
        "mfu",
        "time",
    }
    assert training[-1]["tokens"] == 24 * 2 * 4 * 8
    evals = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evals] == [0, 8, 16, 24]
    assert evals[-1]["val_loss"] < 0.9 * evals[0]["val_loss"]
    assert evals[-1]["full_val_loss"] == pytest.approx(
        evaluate(config.out_dir, "latest")["val_loss"], rel=1e-5
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_three_times_is_the_uninterrupted_run_bit_for_bit(
    make_config, monkeypatch, optimizer
):
    """With dropout and accumulation: every loss, every digit, and the final weights."""
    quiet = make_config("quiet", optimizer=optimizer)
    assert train(quiet, {}) == 0
    stopped = make_config("stopped", init_from="auto", optimizer=optimizer)
    stop_at(monkeypatch, 3, 10, 17)
    codes = [train(stopped, {}) for _ in range(4)]
    assert codes == [128 + signal.SIGTERM] * 3 + [0]
    assert rows_of(stopped) == rows_of(quiet)
    ours, theirs = state_of(stopped, 24), state_of(quiet, 24)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def test_a_killed_run_goes_on_from_its_last_checkpoint(make_config):
    """SIGKILL in another process, at whatever moment; then the same digits as without it."""
    quiet, killed = make_config("quiet"), make_config("killed", init_from="auto", save_interval=3)
    train(quiet, {})
    script = "import sys, json; from jaxgpt.config import Config; from jaxgpt.train import train; "
    script += "train(Config.from_dict(json.loads(sys.argv[1])))"
    command = [sys.executable, "-c", script, json.dumps(killed.to_dict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 13:"):
                process.kill()
    assert process.returncode == -signal.SIGKILL
    checkpoints = run_dir.open_checkpoints(killed)
    assert 0 < checkpoints.latest() < 24
    assert train(killed, {}) == 0
    assert rows_of(killed) == rows_of(quiet)


def test_tokens_read_from_disk_give_the_run_of_tokens_on_the_device(make_config):
    resident, read = (make_config(k, data_on_device=k) for k in ("always", "never"))
    train(resident, {})
    train(read, {})
    for ours, theirs in zip(rows_of(read), rows_of(resident), strict=True):
        # they are other programs, which the newest jax rounds in other places
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("options", [{"steps_per_call": 5}, {"mesh": "data:4"}], ids=str)
def test_dispatches_and_devices_change_nothing_but_rounding(make_config, options):
    one, other = make_config("one"), make_config("other", **options)
    train(one, {})
    train(other, {})
    for ours, theirs in zip(rows_of(other), rows_of(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_only_improvements_are_saved_when_asked_and_the_best_is_kept(make_config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 1.5, 1.9, 1.8])
    config = make_config(
        max_iters=10, eval_interval=2, always_save_checkpoint=False, keep_checkpoints=1
    )
    monkeypatch.setattr("jaxgpt.train.mean_loss", lambda *args: next(losses) if args[2] else 0)
    config = config.replace(eval_iters=1)
    monkeypatch.setattr(
        "jaxgpt.train.Trainer._loss",
        lambda self, stream, *, whole: 9.0 if stream == 1 or whole else next(losses),
    )
    train(config, {})
    checkpoints = run_dir.open_checkpoints(config)
    assert checkpoints.best() == 6
    assert checkpoints.steps() == [6, 10]


def test_eval_only_takes_no_step(make_config):
    config = make_config()
    train(config, {})
    before = state_of(config, 24)
    train(config.replace(init_from="resume", eval_only=True), {})
    rows = read_metrics(Path(config.out_dir, "metrics.jsonl"))
    assert rows[-1]["step"] == 24
    assert state_of(config, 24).keys() == before.keys()


def test_zero_eval_iters_means_the_whole_splits(make_config):
    config = make_config(eval_iters=0, max_iters=8)
    train(config, {})
    row = read_metrics(Path(config.out_dir, "metrics.jsonl"))[-1]
    assert row["val_loss"] == pytest.approx(evaluate(config.out_dir, "latest")["val_loss"])


def test_samples_are_logged_when_asked(make_config):
    config = make_config(sample_every=2, max_iters=16)
    train(config, {})
    log = Path(config.out_dir, "log.txt").read_text()
    sample = log.split("step 16: train")[1].split("\n", 1)[1].split(config.out_dir)[0]
    assert set(sample) <= set(TEXT)
    assert 190 < len(sample) < 210


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(make_config):
    config = make_config(learning_rate=1e30, grad_clip=0.0, warmup_iters=0)
    with pytest.raises(UserError, match=r"step \d+: the loss is (nan|inf).*learning_rate"):
        train(config, {})
    checkpoints = run_dir.open_checkpoints(config)
    for step in checkpoints.steps():
        assert all(np.isfinite(value).all() for value in state_of(config, step).values())


def test_a_changed_dataset_is_noticed(make_config, tmp_path):
    (tmp_path / "tale.txt").write_text(TEXT)
    prepare(str(tmp_path / "tale.txt"), str(tmp_path))
    config = make_config(data_dir=str(tmp_path), max_iters=8)
    train(config, {})
    (tmp_path / "tale.txt").write_text(TEXT.replace("idiot", "tidio"))
    prepare(str(tmp_path / "tale.txt"), str(tmp_path))
    with pytest.raises(UserError, match="dataset='tale': has changed"):
        train(config.replace(init_from="resume", max_iters=16), {})


def test_a_vocabulary_smaller_than_the_datasets_is_refused(make_config):
    with pytest.raises(UserError, match=r"vocab_size=5: must be at least the dataset's \d+"):
        train(make_config(vocab_size=5), {})
