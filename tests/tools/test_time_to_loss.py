"""Test the study of a recipe: which runs it trains, and the steps to the baseline's loss."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from helpers import make_data, refusal

from jaxgpt.config import Config, UserError
from jaxgpt.tools import ablate, time_to_loss
from jaxgpt.tools.time_to_loss import FIRST_SHARE, SHARES, share_to_loss


@pytest.mark.parametrize("exact", [0.08, 0.12, 0.2, 0.4, 0.9])
def test_steps_to_a_loss_are_found_if_the_loss_falls_with_the_logarithm_of_steps(exact):
    tried = []

    def loss(share: float) -> float:
        tried.append(share)
        return 2.0 - math.log(share / exact)

    assert share_to_loss(loss, 2.0) == pytest.approx(exact)
    nearest = min(share for share in SHARES if share >= exact)
    assert max(tried) == max(nearest, SHARES[FIRST_SHARE])  # no run is longer than needed


@pytest.mark.parametrize("exact", [0.01, 1.5])
def test_steps_beyond_the_lengths_are_unknown(exact):
    assert math.isnan(share_to_loss(lambda share: 2.0 - math.log(share / exact), 2.0))


def test_a_run_that_diverges_does_not_reach_the_loss():
    losses = {share: math.nan if share < 0.4 else 2.0 - share for share in SHARES}
    losses[0.33] = 1.7
    assert 0.33 < share_to_loss(losses.__getitem__, 1.6) < 0.5


def test_table_compares_variants_with_the_recipe():
    results = {
        "baseline": time_to_loss.Result(np.array([1.0, 1.0]), 1.0),
        "recipe": time_to_loss.Result(np.array([0.2, 0.2]), 1.5),
        "without rope": time_to_loss.Result(np.array([0.4, 0.2]), 1.0),
        "without muon": time_to_loss.Result(np.array([math.nan, 0.2]), 1.0),
    }
    rows = time_to_loss.format_table(results).splitlines()
    assert rows[3] == "| recipe | 20.0% ± 0.0% | 1.50 | 30.0% ± 0.0% |  |"
    assert rows[4].endswith("| 30.0% ± 14.1% | 1.00 ± 0.47 |")
    assert "1 of 2 seeds beyond the lengths tried" in rows[5]


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    parts: ClassVar = {"rope": {"position": "learned"}}


@pytest.mark.slow
def test_study_trains_the_baseline_the_recipe_and_the_recipe_without_each_part(
    tmp_path, monkeypatch
):
    folder = make_data(tmp_path)
    baseline = Config(
        data_dir=str(folder), dataset="tale", n_layer=1, n_head=2, n_embd=16, block_size=8,
        batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2, warmup_iters=2,
        max_iters=20, eval_interval=1000, eval_iters=1, mesh="data:1", steps_per_call=2,
    )  # fmt: skip
    monkeypatch.setattr(time_to_loss, "step_cost", lambda configs, name, out_dir: 1.5)
    recipe = Recipe(**baseline.to_dict() | {"position": "rope"})
    out_dir = tmp_path / "study"
    assert time_to_loss.measure(baseline, recipe, [], 1, str(out_dir)) == 0
    text = (out_dir / "parts.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [
        "baseline", "recipe", "without rope",
    ]  # fmt: skip
    folders = {path.parent.parent.parent.name for path in out_dir.rglob("metrics.jsonl")}
    assert folders == {"baseline", "recipe", "without_rope"}
    assert json.loads((out_dir / "parts.json").read_text())["recipe"]["cost"] == 1.5
    monkeypatch.setattr(ablate, "train", None)  # a second call trains nothing
    assert time_to_loss.measure(baseline, recipe, [], 1, str(out_dir)) == 0


def test_unknown_part_is_rejected():
    expected = "^features='rop': unknown part; expected one of recipe, rope$"
    with pytest.raises(UserError, match=expected):
        time_to_loss.measure(Config(), Recipe(), ["rop"], 1, "out")


def test_recipe_of_other_steps_than_the_baseline_is_rejected():
    recipe = Recipe(max_iters=500)
    message = refusal(time_to_loss.measure, Config(max_iters=2000), recipe, [], 1, "out")
    assert message.startswith("max_iters=500: the baseline has max_iters=2000; expected the same")


def test_baseline_that_ends_early_is_rejected():
    baseline = Config(early_stopping_patience=3)
    message = refusal(time_to_loss.measure, baseline, Recipe(), [], 1, "out")
    assert message.startswith("early_stopping_patience=3: a run that ends early cannot be compared")


def test_table_of_one_seed_has_no_spread():
    results = {
        "baseline": time_to_loss.Result(np.array([1.0]), 1.0),
        "recipe": time_to_loss.Result(np.array([0.2]), 1.5),
    }
    row = time_to_loss.format_table(results).splitlines()[3]
    assert row == "| recipe | 20.0% | 1.50 | 30.0% |  |"
