"""`jaxgpt ablate`: train a baseline and each feature, and compare their validation losses.

A run trains one feature with one seed, in `out_dir/<feature>/<seed>/`. Finished runs are not
repeated, and stopped runs resume. All runs of a seed see the same batches, so losses are compared
seed by seed.
"""

import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import find_dataset
from jaxgpt.resolve import AUTO_KEYS
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.device import resolve_auto
from jaxgpt.runtime.files import atomic_write
from jaxgpt.runtime.metrics import read_metrics
from jaxgpt.tools.bench.report import describe_machine, interleaved
from jaxgpt.tools.bench.training import JaxGPT
from jaxgpt.train import train

BASELINE, COMBINED = "baseline", "together"

# Feature -> the keys that switch it on, and its source.
FEATURES: dict[str, tuple[dict[str, Any], str]] = {
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
_KEYS = {key: value for name in WINNERS for key, value in FEATURES[name][0].items()}
FEATURES[COMBINED] = (_KEYS, ", ".join(WINNERS))

# Lengths of runs as fractions of the config's steps, each with a learning rate schedule of its own.
# The baseline's lengths give its loss after other training times. The combination's lengths tell
# when it reaches the baseline's final loss.
LENGTHS = dict.fromkeys(FEATURES, (1.0,))
LENGTHS |= {BASELINE: (0.75, 1.0, 1.5), COMBINED: (0.2, 0.4, 1.0)}
REPEATS = 7  # rounds that time a step


@dataclass(frozen=True)
class Result:
    """The results of a feature's runs; arrays have one element per seed, losses are in nats."""

    losses: np.ndarray
    difference: np.ndarray  # loss minus the baseline's loss after as many steps
    cost: float  # time per step relative to the baseline's
    same_time: np.ndarray  # loss minus the loss of a baseline that trains for the same time


def ablate(config: Config, features: list[str], seeds: int, out_dir: str) -> int:
    """Train missing runs, time steps, and write menu.md, menu.png and menu.json to `out_dir`.

    Return 0, or 128 + n if signal n stopped a run; the same command then resumes the run. Raises
    `UserError` for an unknown feature, and for runs of another config in `out_dir`.
    """
    for name in features:
        if name not in FEATURES:
            (nearest,) = difflib.get_close_matches(name, FEATURES, n=1, cutoff=0)
            expected = f"expected one of {', '.join(FEATURES)}"
            problem = f"unknown feature; {expected}; try --features {nearest}"
            raise UserError(f"features={name!r}: {problem}")
    check_runs_end(config)
    names = [BASELINE, *(features or FEATURES)]
    configs = {name: with_feature(config, name) for name in names}  # fails now if it is invalid
    for seed in range(1, seeds + 1):
        for name in names:
            for share in LENGTHS[name]:
                if code := train_run(run_config(config, name, seed, share, out_dir)):
                    return code
    costs = {name: step_cost(configs, name, out_dir) for name in names}
    results = compare(config, costs, seeds, out_dir)
    text = format_table(results) + "\n" + format_speedup(config, results, seeds, out_dir)
    Path(out_dir, "menu.md").write_text(text, encoding="utf-8")
    draw(results, Path(out_dir, "menu.png"))
    write_json(Path(out_dir, "menu.json"), {name: asdict(r) for name, r in results.items()})
    print(text)
    return 0


def write_json(file: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write arrays as lists, and a number that is not finite as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return [plain(float(number)) for number in value]
        return value if math.isfinite(value) else None

    found = {name: {key: plain(v) for key, v in row.items()} for name, row in results.items()}
    atomic_write(file, json.dumps(found, indent=1, allow_nan=False))


def run_config(config: Config, name: str, seed: int, share: float, out_dir: str) -> Config:
    """Return the config of a feature's run with a seed, for a fraction `share` of the steps."""
    folder = name if share == 1 else f"{name}-x{share:g}"
    run_dir = str(Path(out_dir, folder, str(seed)))
    return at_length(with_feature(config, name), share, out_dir=run_dir, seed=seed)


def at_length(config: Config, share: float, **keys: Any) -> Config:
    """Return the config of a run for a fraction of the steps, with a schedule of that length."""
    lengths = {key: round(share * getattr(config, key)) for key in ("max_iters", "lr_decay_iters")}
    return config.replace(init_from="auto", **lengths, **keys)


def with_feature(config: Config, name: str) -> Config:
    """Switch a feature on; the baseline has none."""
    return config.replace(**FEATURES[name][0]) if name in FEATURES else config


def check_runs_end(config: Config) -> None:
    """Raise `UserError` for a key that ends runs early, or that starts them from weights."""
    for key in "eval_only", "early_stopping_patience", "target_val_loss":
        if value := getattr(config, key):
            problem = "a run that ends early cannot be compared"
            raise UserError(f"{key}={value}: {problem}; expected {key}={getattr(Config, key)}")
    if config.init_from not in ("scratch", "auto", "resume"):
        problem = "the runs of a study start from random weights"
        raise UserError(f"init_from={config.init_from!r}: {problem}; expected init_from='scratch'")


def train_run(config: Config) -> int:
    """Train a run unless it is finished; return 0, or 128 + n if signal n stopped the run."""
    if final_loss(config) is not None:
        return 0
    code = train(config)
    jax.clear_caches()  # else the programs of all runs stay in memory
    return code


def final_loss(config: Config) -> float | None:
    """Return a run's loss on the whole validation split, or None if the run is not finished.

    Raises `UserError` if the run in its folder has another config.
    """
    if not Path(config.out_dir, run_dir.CONFIG).exists():
        return None
    saved = run_dir.load_config(config.out_dir, config=type(config))
    default = type(config)()
    for key, value in config.to_dict().items():
        found = getattr(saved, key)
        is_auto = key in AUTO_KEYS and value == getattr(default, key)
        if found != value and not is_auto:
            problem = f"{config.out_dir} was trained with {found!r}"
            expected = f"expected {key}={found!r} or an empty folder"
            raise UserError(f"{key}={value!r}: {problem}; {expected}; try another --out_dir")
    rows = read_metrics(Path(config.out_dir, "metrics.jsonl"))
    if not rows or rows[-1]["step"] != config.max_iters or "val_loss" not in rows[-1]:
        return None
    return rows[-1].get("full_val_loss", rows[-1]["val_loss"])


def step_cost(configs: dict[str, Config], name: str, out_dir: str) -> float:
    """Time a feature's steps and the baseline's in turn; return the ratio, kept in cost.json.

    A ratio that was kept on other hardware, or with other versions, is measured again.
    """
    file = folder_of(name, out_dir) / "cost.json"
    machine = describe_machine()
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if all(kept.get(key) == machine[key] for key in ("hardware", "versions")):
            return kept["ratio"]
    baseline, feature = (round_of_steps(configs[one]) for one in (BASELINE, name))
    (found,) = interleaved([baseline], feature, REPEATS, ("baseline_s", "feature_s"))
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(machine | found))
    jax.clear_caches()
    return found["ratio"]


def folder_of(name: str, out_dir: str) -> Path:
    """Return the folder of a feature's runs."""
    return Path(out_dir, name.replace(" ", "_"))


def round_of_steps(config: Config) -> Callable[[], float]:
    """Compile a config's step; return a function that takes a round of steps and times them.

    That function returns the seconds per step.
    """
    dataset = find_dataset(config, config.block_size, config.vocab_size)
    config = config.replace(vocab_size=config.vocab_size or dataset.vocab_size)
    jaxgpt = JaxGPT(resolve_auto(config)[0], dataset)
    steps = jaxgpt.round_steps()
    return lambda: jaxgpt.train(steps)[0] / steps


def read_losses(config: Config, name: str, seeds: int, out_dir: str) -> np.ndarray:
    """Return the final losses of a feature's runs, float64 [seeds, lengths]."""
    loss = lambda seed, share: final_loss(run_config(config, name, seed, share, out_dir))
    losses = [[loss(seed, share) for share in LENGTHS[name]] for seed in range(1, seeds + 1)]
    return np.array(losses, float)


def compare(config: Config, costs: dict[str, float], seeds: int, out_dir: str) -> dict[str, Result]:
    """Compare each feature with the baseline, seed by seed.

    The baseline's loss after the feature's time is interpolated in the logarithm of the steps
    between the baseline's lengths; outside of them it is NaN.
    """
    lengths = np.log(LENGTHS[BASELINE])
    baseline = read_losses(config, BASELINE, seeds, out_dir)
    same_steps, results = baseline[:, LENGTHS[BASELINE].index(1.0)], {}
    for name, cost in costs.items():
        losses = read_losses(config, name, seeds, out_dir)[:, LENGTHS[name].index(1.0)]
        at_time = [np.interp(math.log(cost), lengths, row, math.nan, math.nan) for row in baseline]
        results[name] = Result(losses, losses - same_steps, cost, losses - np.array(at_time))
    return results


def format_speedup(config: Config, results: dict[str, Result], seeds: int, out_dir: str) -> str:
    """Say when the winners together reach the baseline's final loss, if they were trained."""
    if COMBINED not in results:
        return ""
    losses = read_losses(config, COMBINED, seeds, out_dir)
    goals, lengths = results[BASELINE].losses, LENGTHS[COMBINED]
    shares = [length_to(goal, lengths, row) for goal, row in zip(goals, losses, strict=True)]
    if np.isnan(shares).any():
        problem = f"before {lengths[0]:.0%} of the steps or not at all, with some seeds"
        return f"\n`{COMBINED}` reaches the baseline's final loss {problem}.\n"
    return (
        f"\n`{COMBINED}` reaches the baseline's final loss after {spread(shares, '.0%')} of the "
        f"steps, which take {np.mean(shares) * results[COMBINED].cost:.0%} of the time.\n"
    )


def length_to(goal: float, lengths: Sequence[float], losses: Sequence[float]) -> float:
    """Return after which length the loss is `goal`, for the losses of runs of several lengths.

    It is interpolated in the logarithm of the length, between the shortest run that reaches the
    goal and the run before. NaN if the first run reaches it, or none does.
    """
    reached = next((i for i, loss in enumerate(losses) if loss <= goal), 0)
    if reached == 0:
        return math.nan
    before, after = losses[reached - 1], losses[reached]
    fraction = (before - goal) / (before - after)
    return lengths[reached - 1] * (lengths[reached] / lengths[reached - 1]) ** fraction


def format_table(results: dict[str, Result]) -> str:
    """Return a Markdown table with a row per feature; means beyond 3 standard errors are bold."""
    columns = ["feature", "keys", "validation loss", "to the baseline", "better", "step time"]
    columns += ["at equal time", "source"]
    rows = [columns]
    for name, r in results.items():
        keys, source = FEATURES.get(name, ({}, ""))
        flags = " ".join(f"`{key}={value}`" for key, value in keys.items())
        better = f"{(r.difference < 0).sum()} of {len(r.difference)}"
        compared = [_difference(r.difference), better, f"{r.cost:.2f}", _difference(r.same_time)]
        compared = [""] * 4 if name == BASELINE else compared
        rows.append([name, flags, spread(r.losses, ".4f"), *compared, source])
    header, *lines = ("| " + " | ".join(row) + " |\n" for row in rows)
    return "".join([header, "|" + "---|" * len(columns) + "\n", *lines])


def spread(values: Sequence[float] | np.ndarray, form: str) -> str:
    """Return mean and standard deviation as text; of one value, the value."""
    mean = f"{np.mean(values):{form}}"
    return f"{mean} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else mean


def _difference(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return "n/a: outside the baseline's lengths"
    text = spread(values, ".4f")
    clear = len(values) > 1 and abs(values.mean()) > 3 * values.std(ddof=1) / len(values) ** 0.5
    return f"**{text}**" if clear else text


def draw(results: dict[str, Result], file: Path) -> None:
    """Plot differences to the baseline: a small dot per seed and a large dot for the mean."""
    from matplotlib.figure import Figure

    shown = {name: r for name, r in results.items() if name != BASELINE}
    figure = Figure(figsize=(8.5, 1.2 + 0.3 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = "after as many steps", "after as much time"
    columns = [r.difference for r in shown.values()], [r.same_time for r in shown.values()]
    for axes, title, column, color in zip(panels, titles, columns, ("C0", "C1"), strict=True):
        for y, values in enumerate(column):
            axes.plot(values, np.full(len(values), y), "o", color=color, alpha=0.35, markersize=3)
            axes.plot(values.mean(), y, "o", color=color, markersize=7)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    labels = [f"{name}  x{r.cost:.2f}" for name, r in shown.items()]
    panels[0].set_yticks(range(len(shown)), labels)
    panels[0].invert_yaxis()
    figure.supxlabel("validation loss minus the baseline's (nats); left is better")
    figure.savefig(file, dpi=100)
