"""`jaxgpt ablate`: trains a baseline and each feature of a menu alike, and says what each gains.

A cell is one run: a feature and a seed, in `out_dir/<feature>/<seed>/`. Cells that are done are
not run again, and one that was stopped goes on. All cells of a seed see the same batches, so
that losses are compared seed by seed.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import find_dataset
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.device import resolve_auto
from jaxgpt.runtime.metrics import read_metrics
from jaxgpt.tools.bench.nanogpt import interleaved
from jaxgpt.tools.bench.training import JaxGPT
from jaxgpt.train import train

BASELINE, TOGETHER = "baseline", "together"

# Feature -> the keys that switch it on, and where it comes from.
MENU: dict[str, tuple[dict[str, Any], str]] = {
    "rope": ({"position": "rope"}, "Su et al. 2021, RoFormer"),
    "rmsnorm": ({"norm": "rmsnorm"}, "Zhang & Sennrich 2019"),
    "swiglu": ({"mlp": "swiglu"}, "Shazeer 2020, GLU Variants"),
    "relu2": ({"mlp": "relu2"}, "So et al. 2021, Primer"),
    "qk_norm": ({"qk_norm": True}, "Henry et al. 2020; Dehghani et al. 2023"),
    "grouped_query": ({"n_kv_head": 2}, "Ainslie et al. 2023, GQA"),
    "softcap": ({"logit_softcap": 15.0}, "Gemma team 2024, Gemma 2"),
    "window": ({"sliding_window": 32}, "Beltagy et al. 2020, Longformer"),
    "value_residual": ({"value_residual": True}, "Zhou et al. 2024"),
    "muon": ({"optimizer": "muon"}, "Jordan et al. 2024; Liu et al. 2025"),
    "wsd": ({"lr_schedule": "wsd"}, "Hu et al. 2024, MiniCPM"),
    "untied": ({"tie_embeddings": False}, "GPT-2 ties: Press & Wolf 2017"),
    "zero_init": ({"zero_init_projections": True}, "Zhang et al. 2019, Fixup"),
}
WINNERS = ("rope", "muon", "wsd", "zero_init")
MENU[TOGETHER] = ({k: v for name in WINNERS for k, v in MENU[name][0].items()}, ", ".join(WINNERS))

# Runs of other lengths, as shares of the steps, each with a schedule of its own: what the
# baseline reaches in another time, and how soon all winners together are where it ends.
LENGTHS = {BASELINE: (0.75, 1.0, 1.5), TOGETHER: (0.2, 0.4, 1.0)}
PAIRS, ROUND = 7, 40  # of turns that time a step; steps of each


@dataclass(frozen=True)
class Found:
    """What the seeds of a feature came to; arrays have an element a seed, losses are in nats."""

    losses: np.ndarray
    difference: np.ndarray
    """To the baseline's loss after as many steps."""
    cost: float
    """A step's time over that of the baseline's."""
    same_time: np.ndarray
    """To the loss of a baseline that trains as long as this did."""


def ablate(config: Config, features: list[str], seeds: int, out_dir: str) -> int:
    """Trains what is not trained yet, times steps, and writes menu.md, menu.png and menu.json.

    -> 0, or 128 + n if signal n ended it: the same command goes on from there. Raises
    `UserError` for a feature that is not on the menu, and for cells of another config.
    """
    for name in features:
        if name not in MENU:
            raise UserError(f"features={name!r}: must be among {', '.join(MENU)}")
    names = [BASELINE, *(features or MENU)]
    for seed in range(1, seeds + 1):
        for name in names:
            for share in LENGTHS.get(name, (1.0,)):
                if code := train_cell(cell(config, name, seed, share, out_dir)):
                    return code
    costs = {name: step_cost(config, name, out_dir) for name in names}
    found = compare(config, costs, seeds, out_dir)
    text = table(found) + "\n" + head_start(config, found, seeds, out_dir)
    Path(out_dir, "menu.md").write_text(text, encoding="utf-8")
    draw(found, Path(out_dir, "menu.png"))
    numbers = {name: {k: np.asarray(v).tolist() for k, v in vars(f).items()} for name, f in found}
    Path(out_dir, "menu.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(text)
    return 0


def cell(config: Config, name: str, seed: int, share: float, out_dir: str) -> Config:
    """The run of a feature and a seed, over this share of the config's steps."""
    folder = name if share == 1 else f"{name}-x{share:g}"
    return keys_of(config, name).replace(
        out_dir=str(Path(out_dir, folder, str(seed))),
        init_from="auto",
        seed=seed,
        max_iters=round(share * config.max_iters),
    )


def keys_of(config: Config, name: str) -> Config:
    return config.replace(**MENU[name][0]) if name in MENU else config


def train_cell(config: Config) -> int:
    """Runs a cell unless it is done -> 0, or 128 + n if signal n ended it."""
    if final_loss(config) is not None:
        return 0
    code = train(config, {})
    jax.clear_caches()  # dozens of compiled programs would pile up
    return code


def final_loss(config: Config) -> float | None:
    """Of the whole validation split, or None for a cell that is not done.

    Raises `UserError` if what lies there is of another config.
    """
    if not Path(config.out_dir, run_dir.CONFIG).exists():
        return None
    saved = run_dir.load_config(config.out_dir)
    for key, value in config.replace(vocab_size=saved.vocab_size).to_dict().items():
        if getattr(saved, key) != value:
            raise UserError(
                f"{key}={value!r}: {config.out_dir} was trained with {getattr(saved, key)!r}; "
                "name another --out_dir"
            )
    rows = read_metrics(Path(config.out_dir, "metrics.jsonl"))
    done = rows and rows[-1]["step"] == config.max_iters and "val_loss" in rows[-1]
    return rows[-1].get("full_val_loss", rows[-1]["val_loss"]) if done else None


def step_cost(config: Config, name: str, out_dir: str) -> float:
    """A step's time over the baseline's: median of pairs taken in turn, kept in cost.json."""
    file = Path(out_dir, name, "cost.json")
    if not file.exists():
        dataset = find_dataset(config, config.block_size)
        sides = []
        for one in (BASELINE, name):
            known = keys_of(config, one).replace(vocab_size=dataset.vocab_size)
            sides.append(JaxGPT(resolve_auto(known)[0], dataset))
        baseline, feature = (lambda side=side: side.train(ROUND)[0] for side in sides)
        for turn in (baseline, feature):
            turn()  # the first steps are slower
        (found,) = interleaved([baseline], feature, PAIRS)
        file.write_text(json.dumps(found), encoding="utf-8")
        jax.clear_caches()
    return json.loads(file.read_text(encoding="utf-8"))["ratio"]


def curves(config: Config, name: str, seeds: int, out_dir: str) -> np.ndarray:
    """Final losses after each of the feature's lengths, [seeds, lengths]."""
    lengths = LENGTHS.get(name, (1.0,))
    cells = [
        [cell(config, name, seed, share, out_dir) for share in lengths]
        for seed in range(1, seeds + 1)
    ]
    return np.array([[final_loss(one) for one in row] for row in cells], float)


def compare(
    config: Config, costs: dict[str, float], seeds: int, out_dir: str
) -> list[tuple[str, Found]]:
    """What each feature came to beside the baseline, in the menu's order.

    A baseline of other lengths than those trained is read off between them, along the
    logarithm of the steps; beyond them it cannot be told.
    """
    lengths = np.log(LENGTHS[BASELINE])
    base = curves(config, BASELINE, seeds, out_dir)
    same_steps, found = base[:, LENGTHS[BASELINE].index(1.0)], []
    for name, cost in costs.items():
        losses = curves(config, name, seeds, out_dir)[:, LENGTHS.get(name, (1.0,)).index(1.0)]
        read = lambda row, at=math.log(cost): np.interp(at, lengths, row, math.nan, math.nan)
        same_time = losses - np.array([read(row) for row in base])
        found.append((name, Found(losses, losses - same_steps, cost, same_time)))
    return found


def head_start(config: Config, found: list[tuple[str, Found]], seeds: int, out_dir: str) -> str:
    """How soon the winners together are where the baseline ends, if they were trained."""
    both = dict(found)
    if TOGETHER not in both:
        return ""
    steps, goals = np.log(LENGTHS[TOGETHER]), both[BASELINE].losses
    rows = curves(config, TOGETHER, seeds, out_dir)
    shares = [
        math.exp(np.interp(goal, row[::-1], steps[::-1], math.nan, math.nan))
        for goal, row in zip(goals, rows, strict=True)
    ]
    if np.isnan(shares).any():
        return f"\n`{TOGETHER}` meets the baseline's final loss at none of the lengths tried.\n"
    return (
        f"\n`{TOGETHER}` has the baseline's final loss after {_spread(shares, '.0%')} of its "
        f"steps, which take {np.mean(shares) * both[TOGETHER].cost:.0%} of its time.\n"
    )


def table(found: list[tuple[str, Found]]) -> str:
    """Markdown, a row a feature. Bold is a mean beyond three standard errors."""
    lines = [
        "| feature | keys | validation loss | to the baseline | better | step time | "
        "at equal time | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, f in found:
        keys, source = MENU.get(name, ({}, ""))
        flags = " ".join(f"`{key}={value}`" for key, value in keys.items())
        cells = [name, flags, _spread(f.losses, ".4f")]
        if name != BASELINE:
            better = f"{(f.difference < 0).sum()} of {len(f.difference)}"
            cells += [_difference(f.difference), better, f"{f.cost:.2f}"]
            cells += [_difference(f.same_time), source]
        lines.append("| " + " | ".join(cells + [""] * (8 - len(cells))) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Any, form: str) -> str:
    """Mean and standard deviation."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return f"{np.mean(values):{form}} ± {deviation:{form}}"


def _difference(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return "beyond the baselines"
    text = _spread(values, ".4f")
    clear = len(values) > 1 and abs(values.mean()) > 3 * values.std(ddof=1) / len(values) ** 0.5
    return f"**{text}**" if clear else text


def draw(found: list[tuple[str, Found]], file: Path) -> None:
    """Differences to the baseline, a small dot a seed and a large one for their mean."""
    from matplotlib.figure import Figure

    shown = [(name, f) for name, f in found if name != BASELINE]
    figure = Figure(figsize=(8.5, 1.2 + 0.3 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, title, color in zip(
        panels, ("after as many steps", "after as much time"), ("C0", "C1"), strict=True
    ):
        for y, (_, f) in enumerate(shown):
            values = f.difference if color == "C0" else f.same_time
            axes.plot(values, np.full(len(values), y), "o", color=color, alpha=0.35, markersize=3)
            axes.plot(values.mean(), y, "o", color=color, markersize=7)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(shown)), [f"{name}  x{f.cost:.2f}" for name, f in shown])
    panels[0].invert_yaxis()
    figure.supxlabel("validation loss minus the baseline's (nats); left is better")
    figure.savefig(file, dpi=100)
