"""Compare calculators that train for the same time: with and without working, digits in two orders.

    python docs/calculator.py [FOLDER-OF-THE-RUNS [PICTURE]]

The problems have numbers of one and two digits. Each calculator is trained with three seeds. The
finished runs in the folder are not repeated, and a stopped run resumes.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from configs.calculator import config as calculator
from jaxgpt.config import Config
from jaxgpt.data.tasks import TASKS, Arithmetic
from jaxgpt.interop.trained import open_trained
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.sample import Sampler
from jaxgpt.tools.ablate import spread, train_run
from jaxgpt.tools.evaluation import greedy_solutions, kind_of_error

SEEDS = 1, 2, 3
OPERATIONS = TASKS["calculator"]
STEPS = 600  # with working
STEPS_WITHOUT = 2160  # without, in the same time
study = calculator.replace(
    digits=2,
    lr_decay_iters=0,  # every run has a schedule of its own length
    eval_interval=1_000_000,  # evaluate only at the end
)
CONFIGS = {
    "working, reversed digits": study.replace(block_size=70),
    "working, plain digits": study.replace(block_size=70, reverse_digits=False),
    "no working, reversed digits": study.replace(block_size=15, working=False),
    "no working, plain digits": study.replace(block_size=15, working=False, reverse_digits=False),
}


def exact_answers(config: Config) -> np.ndarray:
    """Return the fraction of the held-out problems with exact answers, per operation [4]."""
    trained = open_trained("resume", config.out_dir, "latest")
    params, _ = trained.load(local_mesh())
    forms = {"working": config.working, "reverse_digits": config.reverse_digits}
    task = Arithmetic(OPERATIONS, config.digits, **forms)
    solutions = greedy_solutions(Sampler(trained.config).load(params), task)
    pairs = zip(solutions, task.solutions(task.held_out), strict=True)
    is_right = np.array([kind_of_error(*pair) is None for pair in pairs])
    kinds = task.held_out.kind
    return np.array([is_right[kinds == kind].mean() for kind in range(len(OPERATIONS))])


def draw(exact: dict[str, np.ndarray], file: Path) -> None:
    """Draw the exact answers of each calculator: a small dot per seed, a large one for the mean."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, exact_RK) in enumerate(exact.items()):
        place_K = np.arange(len(OPERATIONS)) + 0.18 * (i - 1.5)
        for exact_K in exact_RK:
            axes.plot(place_K, 100 * exact_K, "o", color=f"C{i}", alpha=0.35, markersize=4)
        means_K = 100 * exact_RK.mean(axis=0)
        axes.plot(place_K, means_K, "o", color=f"C{i}", markersize=8, label=name)
    axes.set_xticks(range(len(OPERATIONS)), list(OPERATIONS), fontsize="x-large")
    axes.set(ylabel="exact answers (%)", ylim=(-3, 103))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main(folder: str = "out/calculators", picture: str = "docs/pictures/calculators.png") -> None:
    """Train the missing runs, print a table of the exact answers, and draw it."""
    exact = {}
    for name, config in CONFIGS.items():
        steps = STEPS if config.working else STEPS_WITHOUT
        exact_RK = []
        for seed in SEEDS:
            out_dir = str(Path(folder, name.replace(" ", "_"), str(seed)))
            run = config.replace(out_dir=out_dir, init_from="auto", seed=seed, max_iters=steps)
            if code := train_run(run):
                sys.exit(code)
            exact_RK.append(exact_answers(run))
        exact[name] = np.array(exact_RK)
        means = " | ".join(spread(100 * exact_R, ".1f") for exact_R in exact[name].T)
        print(f"| {name} | {steps} | {means} |", flush=True)
    draw(exact, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
