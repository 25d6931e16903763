"""Draw the README's picture from results that earlier benchmarks wrote, and from a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.config import UserError
from jaxgpt.runtime import storage
from jaxgpt.runtime.files import atomic_path, reason
from jaxgpt.runtime.metrics import read_metrics

LABELS = {
    "eager": "training, nanoGPT eager",
    "compiled": "training, torch.compile",
    "nanogpt_truncate": "sampling, float32",
    "nanogpt_bfloat16": "sampling, bfloat16 weights",
}


def draw_chart(results: Sequence[str], out_dir: str, file: str) -> list[str]:
    """Draw a run's losses beside the speed-ups in `results`, JSON files of comparisons.

    Returns one line per speed-up. Raises `UserError` for a file without speed-ups.
    """
    from matplotlib.figure import Figure

    if not results:
        raise UserError("results: missing; expected JSON files that --compare_to and --json wrote")
    bars = [bar for path in results for bar in read_speedups(Path(path))]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    draw_losses(left, storage.local(out_dir))
    names, medians, lows, highs = zip(*bars, strict=True)
    rows = range(len(bars), 0, -1)
    errors = [
        [median - low for median, low in zip(medians, lows, strict=True)],
        [high - median for median, high in zip(medians, highs, strict=True)],
    ]
    right.barh(rows, medians, xerr=errors, color="C0", alpha=0.8, ecolor="0.4", capsize=3)
    for row, median, high in zip(rows, medians, highs, strict=True):
        right.text(high * 1.06, row, f"{median:.2g}x", va="center")
    right.set_yticks(list(rows), names)
    right.set_xscale("log")
    right.set_xlim(min(0.7, 0.9 * min(lows)), 1.8 * max(highs))
    right.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    right.minorticks_off()
    right.axvline(1, color="0.3", linewidth=1)
    right.set_title("speed relative to PyTorch nanoGPT (median, range)", fontsize=10)
    with atomic_path(Path(file)) as temporary:
        figure.savefig(temporary, dpi=120)
    return [f"{name}: {median:.2f} ({low:.2f}-{high:.2f})" for name, median, low, high in bars]


def draw_losses(axes: Any, run_dir: Path) -> None:
    """Draw the training and validation losses of a run against seconds of training."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run_dir}: no metrics.jsonl with rows; expected a run directory")
    start = rows[0]["time"]
    for key, style, label in (
        ("loss", "0.75", "training steps"),
        ("val_loss", "C1.-", "validation split"),
    ):
        some = [row for row in rows if row.get(key) is not None]
        axes.plot(
            [row["time"] - start for row in some], [row[key] for row in some], style, label=label
        )
    val_losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    if not val_losses:
        raise UserError(f"{run_dir}: no validation loss; expected a run that was evaluated")
    axes.set(xlabel="seconds", ylabel="loss (nats per token)")
    axes.set_title(f"{run_dir.name}: val loss {val_losses[-1]:.2f}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()


def read_speedups(file: Path) -> list[tuple[str, float, float, float]]:
    """Read (label, median, lowest, highest) of every comparison with nanoGPT in a JSON file."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        comparisons = {name: facts["results"].get(name, {}) for name in LABELS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: {reason(error)}; expected a file that --json wrote") from error
    found = []
    for name, result in comparisons.items():
        if "ratio" in result:
            low, high = result["range"]
            found.append((f"{facts['preset']}: {LABELS[name]}", result["ratio"], low, high))
    if not found:
        raise UserError(
            f"{file}: no comparison with nanoGPT; expected a file of --compare_to and --json"
        )
    return found
