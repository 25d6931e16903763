"""Test complete runs: the run directory, and bit-exact stopping and resuming."""

import json
import signal
import time
from pathlib import Path

import pytest
from helpers import (
    TEXT,
    all_rows,
    log_of,
    make_data,
    refusal,
    rows_of,
    set_val_losses,
    state_of,
    stop_at,
    tiny_run,
)

from jaxgpt.config import UserError
from jaxgpt.runtime import run_dir
from jaxgpt.tools.evaluation import evaluate
from jaxgpt.train import train


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_run(data_dir, tmp_path):
    return lambda name="run", **keys: tiny_run(tmp_path / name, data_dir, **keys)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_run_writes_the_documented_files_and_metrics(make_run):
    config = make_run(eval_iters=3)
    assert train(config) == 0
    folder = Path(config.out_dir)
    assert names(folder) == {"config.json", "metrics.jsonl", "loss.png", "log.txt"} | {
        "tokenizer.json", "checkpoints", ".lock",
    }  # fmt: skip
    assert names(folder / "checkpoints") >= {"16", "24", "best"}
    assert names(folder / "checkpoints/24") == {"state", "meta.json", "digest.json"}
    training = [row for row in all_rows(config) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 25))
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_ms", "mfu", "time"}
    assert set(training[0]) == keys
    assert training[-1]["tokens"] == 24 * 2 * 4 * 8
    evals = [row for row in all_rows(config) if "val_loss" in row]
    assert [row["step"] for row in evals] == [0, 8, 16, 24]
    assert evals[-1]["val_loss"] < 0.9 * evals[0]["val_loss"]
    loss = evaluate(config.out_dir, "latest")["val_loss"]
    assert evals[-1]["full_val_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_written_config_has_the_resolved_values(make_run):
    config = make_run(dtype="auto", attention="auto", max_iters=1)
    train(config)
    written = run_dir.load_config(config.out_dir)
    saved = run_dir.open_checkpoints(config).meta(1)["config"]
    assert written.to_dict() == saved
    filled_in = {"dtype": "float32", "attention": "cpu", "vocab_size": len(set(TEXT))}
    assert written == config.replace(**filled_in, steps_per_call=10)


@pytest.mark.slow
def test_run_of_another_device_type_can_be_evaluated_and_resumed(make_run):
    """The run's config names a dtype and an attention of a GPU, which a CPU does not run."""
    config = make_run(dtype="auto", attention="auto", max_iters=8)
    train(config)
    loss = evaluate(config.out_dir, "latest")["val_loss"]
    file = Path(config.out_dir, "config.json")
    keys = json.loads(file.read_text()) | {"dtype": "bfloat16", "attention": "cudnn"}
    file.write_text(json.dumps(keys))
    assert evaluate(config.out_dir, "latest")["val_loss"] == loss
    assert train(config.replace(init_from="resume", max_iters=9)) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_run_stopped_three_times_resumes_bit_exact(make_run, monkeypatch, optimizer):
    """All metrics and the final weights are identical, with dropout and accumulation."""
    quiet = make_run("quiet", optimizer=optimizer)
    assert train(quiet) == 0
    stopped = make_run("stopped", init_from="auto", optimizer=optimizer)
    stop_at(monkeypatch, 3, 10, 17)
    codes = [train(stopped) for _ in range(4)]
    assert codes == [128 + signal.SIGTERM] * 3 + [0]
    assert rows_of(stopped) == rows_of(quiet)
    assert state_of(stopped, 24) == state_of(quiet, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"steps_per_call": 5}, {"mesh": "data:4"}, {"data_on_device": "never"}], ids=str
)
def test_steps_per_call_mesh_and_data_placement_change_only_rounding(make_run, options):
    one, other = make_run("one"), make_run("other", **options)
    train(one)
    train(other)
    for ours, theirs in zip(rows_of(other), rows_of(one), strict=True):
        # the programs differ, and the newest JAX rounds them in different places
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_best_and_last_steps_are_kept_without_always_save_checkpoint(make_run, monkeypatch):
    set_val_losses(monkeypatch, {0: 3.0, 2: 2.0, 4: 2.5, 6: 1.5, 8: 1.9, 10: 1.8})
    keys = {"always_save_checkpoint": False, "keep_checkpoints": 5}
    config = make_run(max_iters=10, eval_interval=2, **keys)
    train(config)
    checkpoints = run_dir.open_checkpoints(config)
    assert checkpoints.best() == 6
    assert checkpoints.steps() == [2, 6, 10]


LOSSES = {0: 5.0, 2: 4.0, 4: 3.25, 6: 3.5, 8: 3.0}
TARGET = {"eval_interval": 2, "max_iters": 8, "target_val_loss": 3.25}


def test_run_stops_at_the_first_evaluation_at_its_target(make_run, monkeypatch):
    """The time of the steps is the sum of the logged step times, also over several sessions."""
    set_val_losses(monkeypatch, LOSSES)
    config = make_run(**TARGET, init_from="auto", always_save_checkpoint=False)
    stop_at(monkeypatch, 1)
    began = time.perf_counter()
    assert [train(config), train(config)] == [128 + signal.SIGTERM, 0]
    seconds = time.perf_counter() - began
    *_, last_step, evaluation, target = rows = all_rows(config)
    assert (last_step["step"], evaluation["val_loss"], evaluation["full_val_loss"]) == (4, 3.25, 9)
    assert (target["step"], target["target_val_loss"], target["tokens"]) == (4, 3.25, 4 * 64)
    steps_s = sum(row["step_ms"] for row in rows if "loss" in row) / 1000
    assert target["train_s"] == pytest.approx(steps_s, rel=1e-6)
    assert steps_s < target["total_s"] < seconds
    said = f"target_val_loss=3.25: reached at step 4, after 256 tokens, {target['train_s']:.1f} s"
    assert said in log_of(config)
    checkpoints = run_dir.open_checkpoints(config)
    assert (checkpoints.latest(), checkpoints.best()) == (4, 4)


@pytest.mark.slow
def test_resumed_run_at_its_target_trains_only_for_a_lower_target(make_run, monkeypatch):
    set_val_losses(monkeypatch, LOSSES)
    config = make_run(**TARGET)
    train(config)
    rows, saved = all_rows(config), run_dir.open_checkpoints(config).meta(4)
    assert train(config.replace(init_from="resume")) == 0
    assert all_rows(config) == rows
    said = "the validation loss is 3.2500 at step 4, so the run takes no more steps; try a lower"
    assert said in log_of(config).splitlines()[-1]
    assert train(config.replace(init_from="resume", target_val_loss=3.0)) == 0
    target = all_rows(config)[-1]
    assert (target["step"], target["target_val_loss"]) == (8, 3.0)
    assert target["train_s"] > saved["train_s"] == rows[-1]["train_s"]


def test_model_that_is_too_large_for_the_memory_is_an_error_of_one_line(make_run):
    message = refusal(train, make_run(n_embd=2**20))
    said = "batch_size=4: the training step does not fit into the device's memory (Out of memory"
    assert message.startswith(said)


def test_finished_run_that_resumes_says_why_it_takes_no_steps(make_run):
    config = make_run(max_iters=2, eval_iters=1)
    train(config)
    assert train(config.replace(init_from="resume")) == 0
    said = "max_iters=2: step 2 is done, so the run takes no more steps; try a larger --max_iters"
    assert log_of(config).splitlines()[-1] == f"{said} to train further"


@pytest.mark.slow
def test_target_that_is_not_reached_is_reported_at_the_end(make_run, monkeypatch):
    set_val_losses(monkeypatch, LOSSES)
    config = make_run(**TARGET | {"target_val_loss": 2.9}, init_from="auto")
    stop_at(monkeypatch, 3)
    train(config)
    assert "target_val_loss" not in log_of(config)  # the run is not at its end
    train(config)
    said = "target_val_loss=2.9: not reached in 8 steps; the lowest validation loss is 3.0000, at"
    assert log_of(config).count(said) == 1
    assert not any("target_val_loss" in row for row in all_rows(config))


def test_eval_only_evaluates_and_takes_no_step(make_run):
    config = make_run(max_iters=8)
    train(config)
    rows, state = rows_of(config), state_of(config, 8)
    again = config.replace(init_from="resume", eval_only=True, max_iters=24)
    assert train(again) == 0
    assert rows_of(config) == [*rows, rows[-1]]
    assert run_dir.open_checkpoints(config).steps() == [8]
    assert state_of(config, 8) == state


def test_eval_iters_0_evaluates_the_whole_split(make_run):
    config = make_run(eval_iters=0, max_iters=8)
    train(config)
    loss = evaluate(config.out_dir, "latest")["val_loss"]
    assert all_rows(config)[-1]["val_loss"] == pytest.approx(loss)


def test_samples_are_logged_with_sample_every(make_run):
    config = make_run(sample_every=2, max_iters=16)
    train(config)
    sample = log_of(config).split("step 16: train")[1].split("\n", 1)[1].split(config.out_dir)[0]
    assert set(sample) <= set(TEXT)
    assert 190 < len(sample) < 210


def test_vocab_size_below_the_dataset_vocabulary_is_rejected(make_run):
    with pytest.raises(UserError, match=r"vocab_size=5: .*; expected at least \d+, or 0"):
        train(make_run(vocab_size=5))


def test_notes_are_logged_at_the_start(make_run):
    config = make_run(max_iters=1)
    train(config, notes=["no accelerator"])
    assert log_of(config).startswith("no accelerator\ndevice: 2 x ")
    assert json.loads(Path(config.out_dir, "config.json").read_text())["n_embd"] == 16
