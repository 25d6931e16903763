"""Compare pretraining on Shakespeare's plays and finetuning on his sonnets with the sonnets alone.

    python configs/pretrain_then_finetune.py

This command makes all runs with three seeds and compares their losses on held-out sonnets. It does
not repeat finished runs, and it resumes interrupted ones. As a config file for train.py, this file
describes the pretraining.
"""

import statistics
import sys

from jaxgpt.config import Config

OUT, SEEDS = "out/pretrain_then_finetune", (1, 2, 3)

config = Config(
    out_dir=f"{OUT}/pretrain",
    eval_interval=250,
    eval_iters=20,
    log_interval=50,
    always_save_checkpoint=False,
    dataset="shakespeare_plays",  # 4.4 million characters
    gradient_accumulation_steps=1,
    batch_size=12,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    bias=False,
    learning_rate=4e-3,
    max_iters=1500,
    min_lr=1e-4,
    beta2=0.99,
    warmup_iters=100,
)
alone = config.replace(
    dataset="shakespeare_sonnets",  # 86 thousand characters
    eval_interval=50,
    max_iters=1000,  # nine epochs
    early_stopping_patience=5,  # the model overfits by then
)
finetune = alone.replace(learning_rate=5e-4, max_iters=500)


def run(config: Config, name: str, seed: int, init_from: str = "scratch") -> str:
    """Train to the end, resuming an interrupted run, and return the run directory."""
    from jaxgpt.runtime import run_dir
    from jaxgpt.train import train

    config = config.replace(out_dir=f"{OUT}/{name}-{seed}", seed=seed, init_from=init_from)
    if run_dir.open_checkpoints(config).latest():
        config = config.replace(init_from="resume")
    code = train(config)
    if code:
        sys.exit(code)  # stopped by a signal
    return config.out_dir


def compare(argv: list[str]) -> None:
    """Make the runs of every seed and print the validation losses of their best checkpoints."""
    from jaxgpt.runtime import device
    from jaxgpt.tools.evaluation import evaluate

    device.start()
    losses: dict[str, list[float]] = {}
    for seed in SEEDS:
        pretrained = run(config, "pretrain", seed)
        runs = {
            "pretrained alone": pretrained,
            "pretrained, then finetuned": run(finetune, "finetune", seed, pretrained),
            "from scratch": run(alone, "alone", seed),
        }
        for name, out_dir in runs.items():
            found = evaluate(out_dir, "best", dataset=alone.dataset)
            losses.setdefault(name, []).append(found["val_loss"])
    print(f"\nvalidation loss on {alone.dataset}, nats per token, by seed; mean and spread")
    for name, some in losses.items():
        by_seed = "  ".join(f"{loss:.4f}" for loss in some)
        print(f"{name:28}{by_seed}  {statistics.mean(some):.4f} +- {statistics.stdev(some):.4f}")


if __name__ == "__main__":
    from jaxgpt.cli.commands import run as run_command

    run_command(compare)
