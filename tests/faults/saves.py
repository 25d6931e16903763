"""Measure what saves cost a run: time until they are complete, longer steps, and memory."""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from helpers import CHILD_ENV, ROOT

from jaxgpt.runtime.metrics import read_metrics

INTERVAL, SAVES, TOKENS = 10, 3, 64
USUAL_INTERVAL = 1000


def measure_saves(folder: Path, config: str) -> bool:
    """Train this config with 64 tokens per step and three saves; print figures, return success."""
    _make_zeros(folder / "data" / "zeros")
    run = folder / "run"
    keys = {"data_dir": folder / "data", "dataset": "zeros", "out_dir": run, "log_interval": 1}
    keys |= {"block_size": TOKENS, "batch_size": 1, "gradient_accumulation_steps": 1}
    keys |= {"max_iters": INTERVAL * (SAVES + 1), "save_interval": INTERVAL, "eval_iters": 1}
    keys |= {"eval_interval": 1000, "sample_every": 0, "steps_per_call": 1}
    flags = [f"--{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "train.py", "--config", config, *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=CHILD_ENV)
    seen = _watch(process, run)
    if process.returncode:
        return False

    rows = read_metrics(run / "metrics.jsonl")
    times = {row["step"]: row["time"] for row in rows if "loss" in row}
    lasts = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
    median = statistics.median(lasts.values())
    newest = run / "checkpoints" / str(INTERVAL * SAVES)
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    print(f"a checkpoint has {size / 1e9:.2f} GB; a step takes {median:.3f} s (median)")
    for step, completed in seen.completed.items():
        beside = [s for s in lasts if times[s - 1] < completed and s > step]
        longer = sum(lasts[s] - median for s in beside)
        share = longer / (longer + USUAL_INTERVAL * median)
        print(
            f"step {step}: complete after {completed - times[step]:.1f} s; the steps beside it "
            f"({len(beside)}) take {longer:.1f} s longer, {share:.2%} of the time with "
            f"--save_interval={USUAL_INTERVAL}"
        )
    print(f"memory: {seen.before_gb:.1f} GB before the first save, at most {seen.most_gb:.1f} GB")
    return len(seen.completed) == SAVES


def _make_zeros(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, tokens in ("train", 100_000_000), ("val", 10_000):
        with open(folder / f"{split}.bin", "wb") as stream:
            stream.truncate(2 * tokens)


class Seen(NamedTuple):
    """The `time.time()` at which each save was complete, by step, and the resident memory."""

    completed: dict[int, float]
    before_gb: float
    most_gb: float


def _watch(process: subprocess.Popen, run: Path) -> Seen:
    completed: dict[int, float] = {}
    before_gb = most_gb = 0.0
    while process.poll() is None:
        gb = _resident_gb(process.pid)
        most_gb = max(most_gb, gb)
        if not any((run / "checkpoints").glob("*")):
            before_gb = max(before_gb, gb)
        for number in range(SAVES):
            step = INTERVAL * (number + 1)
            if step not in completed and (run / f"checkpoints/{step}/digest.json").exists():
                completed[step] = time.time()
        time.sleep(0.05)
    return Seen(completed, before_gb, most_gb)


def _resident_gb(pid: int) -> float:
    """Return the resident memory of a process (Linux), or 0 after its end."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    return kilobytes[0] / 1e6 if kilobytes else 0.0
