"""`jaxgpt ablate` for a recipe: how soon it reaches the baseline's loss, whole and without a part.

A config file whose `config` is the recipe and that also has a `baseline` is such a study. The
class of the recipe names its parts, and the keys that take each of them out. Every variant is
trained for several fractions of the baseline's steps, each with a schedule of its own. The study
looks for the shortest of these runs that reaches the baseline's loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jaxgpt.config import Config, UserError
from jaxgpt.tools.ablate import (
    BASELINE,
    at_length,
    check_runs_end,
    final_loss,
    folder_of,
    length_to,
    spread,
    step_cost,
    train_run,
    write_json,
)

WHOLE = "recipe"
SHARES = (0.067, 0.1, 0.15, 0.22, 0.33, 0.5, 0.75, 1.0)  # of the baseline's steps
FIRST_SHARE = 3  # index in SHARES of the first run; if it reaches the loss, shorter runs follow


@dataclass(frozen=True)
class Result:
    """A variant's results; arrays have one element per seed."""

    steps: np.ndarray  # to the baseline's loss, as a fraction of the baseline's steps
    cost: float  # time per step relative to the baseline's

    @property
    def time(self) -> np.ndarray:
        """The time to the baseline's loss, as a fraction of the baseline's time."""
        return self.steps * self.cost


class Interrupted(Exception):
    """A signal ended a run; the exit code is the argument."""


def measure(
    baseline: Config, recipe: Config, parts: Sequence[str], seeds: int, out_dir: str
) -> int:
    """Train missing runs, time steps, and write parts.md and parts.json to `out_dir`.

    `parts` are the names of the parts to take out, "recipe" for none, and empty for all. Return 0,
    or 128 + n if signal n stopped a run; the same command then resumes the run. Raises `UserError`
    for an unknown part.
    """
    for name in parts:
        if name not in {WHOLE, *recipe.parts}:
            expected = ", ".join([WHOLE, *recipe.parts])
            raise UserError(f"features={name!r}: unknown part; expected one of {expected}")
    for config in baseline, recipe:
        check_runs_end(config)
    if recipe.max_iters != baseline.max_iters:
        problem = f"the baseline has max_iters={baseline.max_iters}; expected the same steps"
        raise UserError(f"max_iters={recipe.max_iters}: {problem}")
    taken = [name for name in parts or recipe.parts if name != WHOLE]
    without = {f"without {name}": recipe.replace(**recipe.parts[name]) for name in taken}
    variants = {BASELINE: baseline, WHOLE: recipe} | without
    steps: dict[str, list[float]] = {BASELINE: [1.0] * seeds}
    try:
        for name in (WHOLE, *without):
            steps[name] = []
            for seed in range(1, seeds + 1):
                goal = loss_of(baseline, BASELINE, seed, 1.0, out_dir)
                loss = partial(loss_of, variants[name], name, seed, out_dir=out_dir)
                steps[name].append(share_to_loss(loss, goal))
    except Interrupted as error:
        return error.args[0]
    costs = {name: step_cost(variants, name, out_dir) for name in variants}
    results = {name: Result(np.array(steps[name]), costs[name]) for name in variants}
    text = format_table(results)
    Path(out_dir, "parts.md").write_text(text, encoding="utf-8")
    write_json(Path(out_dir, "parts.json"), {name: asdict(r) for name, r in results.items()})
    print(text)
    return 0


def loss_of(config: Config, name: str, seed: int, share: float, out_dir: str) -> float:
    """Return the loss of one run on the whole validation split; train the run if it is missing."""
    folder = str(Path(folder_of(name, out_dir), f"x{share:g}", str(seed)))
    config = at_length(config, share, out_dir=folder, seed=seed)
    if code := train_run(config):
        raise Interrupted(code)
    loss = final_loss(config)
    return math.nan if loss is None else loss


def share_to_loss(loss: Callable[[float], float], goal: float) -> float:
    """Return the fraction of the baseline's steps after which a variant's loss is `goal`.

    It is interpolated in the logarithm of the steps, between the longest run that misses the goal
    and the shortest that reaches it. NaN if no run misses it, or none reaches it.
    """
    shortest = FIRST_SHARE
    while shortest > 0 and loss(SHARES[shortest]) <= goal:
        shortest -= 1
    while shortest < len(SHARES) and not loss(SHARES[shortest]) <= goal:
        shortest += 1
    if shortest in (0, len(SHARES)):
        return math.nan
    pair = SHARES[shortest - 1], SHARES[shortest]
    return length_to(goal, pair, [loss(share) for share in pair])


def format_table(results: dict[str, Result]) -> str:
    """Return a Markdown table with a row per variant.

    Steps and time are those until the baseline's loss, relative to the baseline's own: the mean and
    the standard deviation over the seeds.
    """
    rows = [
        "| variant | steps | time per step | time | time / the recipe's |",
        "|---" * 5 + "|",
    ]
    for name, r in results.items():
        if name == BASELINE:
            rows.append(f"| {name} | 100% | 1.00 | 100% | |")
            continue
        change = r.time / results[WHOLE].time
        compared = "" if name == WHOLE else spread_or_missing(change, ".2f")
        steps, time = (spread_or_missing(values, ".1%") for values in (r.steps, r.time))
        rows.append(f"| {name} | {steps} | {r.cost:.2f} | {time} | {compared} |")
    return "\n".join(rows) + "\n"


def spread_or_missing(values: np.ndarray, form: str) -> str:
    """Return mean and standard deviation as text, or how many values are missing."""
    if np.isnan(values).any():
        return f"{np.isnan(values).sum()} of {len(values)} seeds beyond the lengths tried"
    return spread(values, form)
