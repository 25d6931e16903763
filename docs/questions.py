"""Answer the questions of lecture.md with five seeds each: print a table and draw a picture.

    python docs/questions.py [FOLDER-OF-THE-RUNS [PICTURE]]

The finished runs in the folder are not repeated, and a stopped run resumes.
"""

import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.lecture.config import LectureConfig
from examples.lecture.stages import FOUR_HEADS, LAYER_NORM, ONE_HEAD, RESIDUALS
from jaxgpt.config import UserError
from jaxgpt.tools.ablate import final_loss, spread, train_run

SEEDS = 1, 2, 3, 4, 5
LEARNING_RATES = 1e-3, 3e-3, 1e-2, 3e-2, 1e-1
QUESTIONS: dict[str, dict[str, LectureConfig]] = {
    "What does the wrong scale cost?": {
        "stage 7": LAYER_NORM,
        "stage 7 with attention_scale=head": LAYER_NORM.replace(attention_scale="head"),
    },
    "Why several heads?": {
        "stage 3, one head of 32": ONE_HEAD,
        "stage 4, four heads of 8": FOUR_HEADS,
    },
    "Why a projection after the heads?": {
        "stage 7 without it": LAYER_NORM.replace(attention_output_proj=False),
        "stage 7": LAYER_NORM,
    },
}
NORMS = {"without layer norm (stage 6)": RESIDUALS, "with layer norm (stage 7)": LAYER_NORM}


def losses(config: LectureConfig, folder: Path) -> np.ndarray:
    """Return the losses on the whole validation split, [seeds]; NaN for a run that diverged."""
    found = []
    for seed in SEEDS:
        run = config.replace(
            out_dir=str(folder / str(seed)),
            init_from="auto",
            seed=seed,
            max_iters=2000,
            eval_interval=1_000_000,  # evaluate only at the end
        )
        try:
            if code := train_run(run):
                sys.exit(code)
        except UserError as error:
            if "expected finite numbers" not in str(error):  # as of a full disk
                raise
            print(error)
        loss = final_loss(run)
        found.append(math.nan if loss is None else loss)
    return np.array(found)


def describe(losses_R: np.ndarray) -> str:
    """Return mean and standard deviation of the finite losses, and how many runs diverged."""
    finite = losses_R[np.isfinite(losses_R)]
    diverged = len(losses_R) - len(finite)
    text = spread(finite, ".3f") if len(finite) else ""
    return text + (f" {diverged} of {len(losses_R)} diverged" if diverged else "")


def draw(losses_by_rate: dict[str, np.ndarray], file: Path) -> None:
    """Draw the losses over the learning rate: a dot per seed, and a line through the means.

    Where runs diverged, there is no mean, and the picture says how many.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, losses_LR) in enumerate(losses_by_rate.items()):
        axes.plot(LEARNING_RATES, losses_LR, "o", color=f"C{i}", alpha=0.35, markersize=4)
        axes.plot(LEARNING_RATES, losses_LR.mean(axis=1), "o-", color=f"C{i}", label=name)
        for rate, diverged in zip(LEARNING_RATES, np.isnan(losses_LR).sum(axis=1), strict=True):
            if diverged:
                text = f"{diverged} of {len(SEEDS)} diverged"
                axes.text(rate, 3.3, text, color=f"C{i}", ha="center")
    axes.set(xlabel="learning rate", ylabel="validation loss (nats per character)", xscale="log")
    axes.set(xlim=(7e-4, 0.2), ylim=(2, 3.4))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=80, metadata={"Software": None})


def main(folder: str = "out/questions", picture: str = "docs/pictures/questions.png") -> None:
    """Train the missing runs, print a row for each config, and draw the learning rates."""
    for question, configs in QUESTIONS.items():
        runs = [losses(c, Path(folder, name.replace(" ", "_"))) for name, c in configs.items()]
        columns = [f"{name}: {describe(row)}" for name, row in zip(configs, runs, strict=True)]
        change = runs[1] - runs[0]  # seed by seed
        columns += [spread(change, ".3f"), f"{(change < 0).sum()} of {len(change)}"]
        print(f"| {question} | {' | '.join(columns)} |", flush=True)
    by_rate = {}
    for name, config in NORMS.items():
        rows = []
        for rate in LEARNING_RATES:
            runs = Path(folder, f"{name.split()[0]}_norm_{rate:g}")
            rows.append(losses(config.replace(learning_rate=rate, min_lr=rate), runs))
            print(f"| {name}, learning rate {rate:g} | {describe(rows[-1])} |", flush=True)
        by_rate[name] = np.array(rows)
    draw(by_rate, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
