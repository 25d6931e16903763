"""Test ablations: runs are trained once, resumed, and compared by seed."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, make_data, refusal, write_config

from jaxgpt.cli import commands
from jaxgpt.config import Config, UserError
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.runtime.metrics import Log, read_metrics
from jaxgpt.tools import ablate, time_to_loss
from jaxgpt.train import train

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = make_data(tmp_path_factory.mktemp("data"))
    return Config(
        data_dir=str(folder), dataset="tale", n_layer=1, n_head=2, n_embd=16, block_size=8,
        batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2, warmup_iters=2,
        max_iters=12, eval_interval=1000, eval_iters=1, mesh="data:1", steps_per_call=2,
    )  # fmt: skip


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Record the trained runs as <feature>/<seed>, without timing steps."""
    names = []

    def noted(config, *rest):
        names.append("/".join(Path(config.out_dir).parts[-2:]))
        return train(config, *rest)

    monkeypatch.setattr(ablate, "train", noted)
    monkeypatch.setattr(ablate, "step_cost", lambda configs, name, out_dir: 1.2)
    return names


@pytest.mark.slow
def test_ablation_trains_each_run_once_and_resumes_a_stopped_run(
    config, trained, tmp_path, monkeypatch
):
    stops, log = [5], Log.train

    def stop(self, row, left_s):
        log(self, row, left_s)
        if row["step"] in stops and "rope" in str(self.folder):
            stops.clear()
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "train", stop)
    out_dir = str(tmp_path / "stopped")
    first = ["baseline-x0.75/1", "baseline/1", "baseline-x1.5/1", "rope/1"]
    assert ablate.ablate(config, ["rope"], 2, out_dir) == 128 + signal.SIGTERM
    assert trained == first
    assert not Path(out_dir, "menu.md").exists()
    assert ablate.ablate(config, ["rope"], 2, out_dir) == 0
    assert trained[4:] == ["rope/1", *(name[:-1] + "2" for name in first)]
    assert "resuming from step" in Path(out_dir, "rope/1/log.txt").read_text()
    assert ablate.ablate(config, ["rope"], 2, out_dir) == 0
    assert len(trained) == 9
    found = json.loads(Path(out_dir, "menu.json").read_text())
    whole = ablate.run_config(config, "rope", 1, 1.0, str(tmp_path / "whole"))
    ablate.train_run(whole)
    assert found["rope"]["losses"][0] == ablate.final_loss(whole)
    assert len({*found["rope"]["losses"], *found["baseline"]["losses"]}) == 4
    assert (Path(out_dir) / "menu.png").stat().st_size > 1000
    assert "| rope | `position=rope` |" in Path(out_dir, "menu.md").read_text()
    with pytest.raises(UserError, match=r"^learning_rate=0.5: .* was trained with 0.01; "):
        ablate.ablate(config.replace(learning_rate=0.5), ["rope"], 2, out_dir)


@pytest.mark.slow
def test_seeds_change_weights_and_data_order_and_features_share_both(config, tmp_path):
    """Without a learning rate the weights stay constant, so losses distinguish the batches."""
    still = config.replace(learning_rate=0.0, min_lr=0.0, max_iters=4, log_interval=1)

    def rows(name: str, seed: int) -> tuple[float, list[float]]:
        one = ablate.run_config(still, name, seed, 1.0, str(tmp_path))
        ablate.train_run(one)
        rows = read_metrics(Path(one.out_dir, "metrics.jsonl"))
        return rows[-1]["full_val_loss"], [row["loss"] for row in rows if "loss" in row]

    (loss, steps), (other, others) = rows("baseline", 1), rows("baseline", 2)
    assert loss != other
    assert not set(steps) & set(others)
    assert rows("wsd", 1) == (loss, steps)


def fake_losses(losses: dict[tuple[str, float], list[float]], monkeypatch) -> None:
    """Let runs end with these losses, by feature and length, one per seed."""

    def final_loss(c: Config) -> float:
        name, seed = Path(c.out_dir).parts[-2:]
        feature, _, share = name.partition("-x")
        return losses[feature, float(share or 1)][int(seed) - 1]

    monkeypatch.setattr(ablate, "final_loss", final_loss)


def test_losses_are_compared_by_seed_at_equal_steps_and_at_equal_time(config, monkeypatch):
    law = lambda share, seed: 2.0 + 0.1 * seed - math.log(share)
    losses = {("baseline", s): [law(s, seed) for seed in (1, 2)] for s in (0.75, 1.0, 1.5)}
    losses |= {("rope", 1.0): [2.0, 2.05], ("muon", 1.0): [1.9, 1.9]}
    fake_losses(losses, monkeypatch)
    costs = {"baseline": 1.0, "rope": 1.25, "muon": 2.0}
    found = ablate.compare(config, costs, 2, "out")
    np.testing.assert_allclose(found["rope"].difference, [-0.1, -0.15])
    np.testing.assert_allclose(found["rope"].same_time, np.log(1.25) - np.array([0.1, 0.15]))
    np.testing.assert_allclose(found["baseline"].same_time, 0, atol=1e-12)
    assert np.isnan(found["muon"].same_time).all()
    rows = {row.split(" | ")[0]: row for row in ablate.format_table(found).splitlines()}
    assert "-0.1250 ± 0.0354" in rows["| rope"]
    assert "| 2 of 2 | 1.25 |" in rows["| rope"]
    assert "outside the baseline" in rows["| muon"]


def test_difference_beyond_three_standard_errors_is_bold(config, monkeypatch):
    losses = {("baseline", s): [2.0, 2.0, 2.0] for s in (0.75, 1.0, 1.5)}
    losses |= {("rope", 1.0): [1.9, 1.91, 1.92], ("relu2", 1.0): [1.9, 2.0, 1.95]}
    fake_losses(losses, monkeypatch)
    found = ablate.compare(config, dict.fromkeys(("baseline", "rope", "relu2"), 1.0), 3, "out")
    rows = ablate.format_table(found).splitlines()
    assert "**-0.0900 ± 0.0100**" in rows[3]
    assert "**" not in rows[4]


def test_speedup_is_measured_where_combined_loss_reaches_baseline_loss(config, monkeypatch):
    law = lambda share: 2.0 - math.log(share)
    losses = {("baseline", s): [law(s)] * 2 for s in (0.75, 1.0, 1.5)}
    losses |= {("together", s): [law(2 * s)] * 2 for s in (0.2, 0.4, 1.0)}
    fake_losses(losses, monkeypatch)
    found = ablate.compare(config, {"baseline": 1.0, "together": 1.4}, 2, "out")
    text = ablate.format_speedup(config, found, 2, "out")
    assert "after 50% ± 0% of the steps, which take 70% of the time" in text


@pytest.mark.parametrize("losses", [[1.9, 1.8, 1.7], [2.3, 2.2, 2.1], [2.2, 2.1, math.nan]])
def test_speedup_is_unknown_before_the_first_length_and_after_the_last(losses):
    assert math.isnan(ablate.length_to(2.0, (0.2, 0.4, 1.0), losses))


def test_speedup_of_a_run_that_overfits_is_where_its_loss_first_falls_to_the_goal():
    found = ablate.length_to(2.0, (0.2, 0.4, 1.0), [2.1, 1.9, 2.05])
    assert found == pytest.approx(0.2 * 2**0.5)


def test_runs_of_other_lengths_have_schedules_of_their_lengths(config):
    config = config.replace(max_iters=100, lr_decay_iters=80)
    half = ablate.run_config(config, "baseline", 1, 0.5, "out")
    assert (half.max_iters, half.lr_decay_iters) == (50, 40)
    schedule_of_run = config.replace(lr_decay_iters=0)  # of the run's own length
    assert ablate.run_config(schedule_of_run, "baseline", 1, 0.5, "out").lr_decay_iters == 0


def test_numbers_that_are_not_finite_are_null_in_results(tmp_path):
    file = tmp_path / "menu.json"
    ablate.write_json(file, {"rope": {"losses": np.array([1.5, math.nan]), "cost": math.inf}})
    assert json.loads(file.read_text()) == {"rope": {"losses": [1.5, None], "cost": None}}


ENDS_EARLY = [{"early_stopping_patience": 3}, {"target_val_loss": 1.5}, {"eval_only": True}]


def test_weights_to_start_from_are_rejected(config, tmp_path):
    message = refusal(ablate.ablate, config.replace(init_from="gpt2"), [], 1, str(tmp_path))
    assert message.startswith("init_from='gpt2': the runs of a study start from random weights")


def test_invalid_feature_is_rejected_before_the_first_run(config, trained, tmp_path):
    odd = config.replace(n_head=16)  # one number per head cannot be rotated
    assert "odd" in refusal(ablate.ablate, odd, ["rope"], 1, str(tmp_path))
    assert trained == []


@pytest.mark.parametrize("keys", ENDS_EARLY, ids=str)
def test_runs_that_end_early_are_rejected(config, tmp_path, keys):
    message = refusal(ablate.ablate, config.replace(**keys), [], 1, str(tmp_path))
    assert "a run that ends early cannot be compared" in message


@pytest.mark.slow
def test_step_cost_is_the_median_of_interleaved_ratios_and_is_cached(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "REPEATS", 2)
    monkeypatch.setattr(ablate.JaxGPT, "round_steps", lambda jaxgpt: jaxgpt.whole_calls(2))
    (tmp_path / "muon").mkdir()
    configs = {name: ablate.with_feature(config, name) for name in ("baseline", "muon")}
    cost = ablate.step_cost(configs, "muon", str(tmp_path))
    pairs = json.loads((tmp_path / "muon/cost.json").read_text())["pairs"]
    assert len(pairs) == 2
    assert cost == pytest.approx(np.median([p["feature_s"] / p["baseline_s"] for p in pairs]))
    monkeypatch.setattr(ablate, "interleaved", lambda *args: [{"ratio": 5.0}])
    assert ablate.step_cost(configs, "muon", str(tmp_path)) == cost
    elsewhere = {"hardware": {"cpu": "another"}, "versions": {}}
    monkeypatch.setattr(ablate, "describe_machine", lambda: elsewhere)
    assert ablate.step_cost(configs, "muon", str(tmp_path)) == 5.0


@pytest.mark.slow
def test_command_compares_features_of_a_config_file(config, trained, tmp_path, capsys):
    argv = write_study(tmp_path, config, "")
    assert commands.ablate([*argv, "--features=rope", "--seeds=1", "--max_iters=8"]) == 0
    table = Path(tmp_path, "study", "menu.md").read_text()
    assert "| rope | `position=rope` |" in table
    assert table in capsys.readouterr().out
    assert read_metrics(tmp_path / "study/rope/1/metrics.jsonl")[-1]["step"] == 8


@pytest.mark.slow
def test_command_studies_a_recipe_if_the_config_file_has_a_baseline(
    config, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(time_to_loss, "step_cost", lambda configs, name, out_dir: 1.2)
    argv = write_study(tmp_path, config, "baseline, config = config, config.replace(bias=False)")
    assert commands.ablate([*argv, "--features=recipe", "--seeds=1", "--max_iters=20"]) == 0
    table = Path(tmp_path, "study", "parts.md").read_text()
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == ["baseline", "recipe"]
    assert table in capsys.readouterr().out
    for name, bias in ("baseline", True), ("recipe", False):  # flags hold for both
        (*_, longest) = sorted(tmp_path.glob(f"study/{name}/*/1/config.json"))
        saved = json.loads(longest.read_text())
        assert saved["bias"] is bias
        assert saved["max_iters"] == round(20 * float(longest.parts[-3][1:]))


def write_study(folder: Path, config: Config, more: str) -> list[str]:
    """Write a config file, and return the flags of a study of it in `folder`/study."""
    file = write_config(folder / "small.py", config.to_dict(), more)
    return [f"--config={file}", f"--out_dir={folder / 'study'}"]


def test_unknown_feature_is_rejected_with_nearest_name(config, tmp_path):
    with pytest.raises(
        UserError, match=r"^features='rop': unknown feature; .*; try --features rope$"
    ):
        ablate.ablate(config, ["rop"], 1, str(tmp_path))


def test_every_feature_changes_the_small_baseline():
    config = load_config_file(str(CONFIGS / "ablate.py"))["config"]
    for keys, _ in ablate.FEATURES.values():
        assert config.replace(**keys) != config
