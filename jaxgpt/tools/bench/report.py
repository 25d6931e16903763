"""The settings, timers and reports that all benchmarks share."""

import hashlib
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxgpt
from jaxgpt.config import Config
from jaxgpt.data.tokens import Dataset
from jaxgpt.runtime import device
from jaxgpt.tools.bench.nanogpt import NanoGPT

REST_S = 0.3  # before a turn, so that the other side's threads fall asleep


@dataclass(frozen=True)
class Bench:
    """A resolved config to time with its data, and nanoGPT's process if there is one."""

    name: str
    config: Config
    dataset: Dataset
    nanogpt: NanoGPT | None = None
    modes: tuple[str, ...] = ()  # how nanoGPT runs: eager, compiled
    repeats: int = 5
    plot: Path = Path("bench.png")
    say: Callable[[str], None] = field(default=lambda text: None)  # shows progress


@dataclass
class Report:
    """Results of a benchmark: a headline, a table, notes below it, and all values for JSON."""

    headline: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    results: dict[str, Any]


def quartiles(samples: list[float]) -> dict[str, float]:
    q1, median, q3 = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def call_ms(call: Callable[[], Any], rounds: int = 7) -> list[float]:
    """Return milliseconds per call in each round of about 0.1 s, after a warm-up."""

    def time_calls(calls: int) -> float:
        began = time.perf_counter()
        if device.is_cpu():  # whose calls may end in another order
            jax.block_until_ready([call() for _ in range(calls)])
        else:  # only the last result is kept, so that the others take no memory
            result = None
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        return 1000 * (time.perf_counter() - began) / calls

    time_calls(1)
    calls = max(1, int(100 / time_calls(2)))
    return [time_calls(calls) for _ in range(rounds)]


def interleaved(
    runs: list[Callable[[], float]],
    other: Callable[[], float],
    repeats: int,
    keys: tuple[str, str] = ("jaxgpt_s", "nanogpt_s"),
) -> list[dict[str, Any]]:
    """Time `runs` and `other` in turn, `repeats` times, with one running at a time.

    Return for each run its pairs with `other` in seconds (under `keys`), and the median and the
    range of the ratios other / run.
    """
    seconds = []
    for _ in range(repeats):
        for turn in (*runs, other):
            time.sleep(REST_S)
            seconds.append(turn())
    *columns, other_s = np.reshape(seconds, (repeats, len(runs) + 1)).T
    results = []
    for run_s in columns:
        ratios = other_s / run_s
        rows = np.stack([run_s, other_s, ratios], axis=1).tolist()
        pairs = [dict(zip((*keys, "ratio"), row, strict=True)) for row in rows]
        spread = [float(ratios.min()), float(ratios.max())]
        results.append({"pairs": pairs, "ratio": float(np.median(ratios)), "range": spread})
    return results


def format_ratios(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name}: {result['error']}"
    each = " ".join(f"{row['ratio']:.2f}" for row in result["pairs"])
    (low, high), median = result["range"], result["ratio"]
    return f"{name} / jaxgpt, pair by pair: {each}; median {median:.2f} ({low:.2f}-{high:.2f})"


def describe_machine() -> dict[str, Any]:
    """Return the hardware, the versions of the libraries, jaxgpt's commit and the time.

    The commit of a checkout with changes or new files ends with -dirty and a hash of them.
    """
    info, root, git = Path("/proc/cpuinfo"), Path(__file__).parents[3], shutil.which("git")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    commit = ""
    if git and (root / ".git").exists():

        def ask(*words: str) -> bytes:
            return subprocess.run([git, "-C", str(root), *words], capture_output=True).stdout

        commit = ask("rev-parse", "HEAD").decode().strip()
        new_files = ask("ls-files", "--others", "--exclude-standard", "jaxgpt").decode().split("\n")
        changes = ask("diff", "HEAD")
        changes += b"".join((root / file).read_bytes() for file in filter(None, new_files))
        if changes:
            commit += f"-dirty-{hashlib.sha256(changes).hexdigest()[:7]}"
    hardware = {
        "device": jax.devices()[0].device_kind,
        "devices": 1 if device.is_cpu() else jax.device_count(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": device.cores(),
        "memory_bytes": device.memory_bytes(),
    }
    versions = {p: version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")}
    versions |= {"jaxgpt": jaxgpt.__version__, "python": platform.python_version()}
    now = time.time()
    return {"hardware": hardware, "versions": versions, "commit": commit or None, "time": now}


def show(report: Report, facts: dict[str, Any]) -> None:
    """Print the headline, then the table, then the notes."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    on, config = facts["hardware"], facts["config"]
    chip = on["device"] if on["device"] != "cpu" else f"{on['cpu']}, {on['cores']} cores"
    torch = f", torch {facts['nanogpt']['torch']}" if facts["nanogpt"] else ""
    console.print(f"{facts['what']}, {facts['preset']}: {report.headline}", style="bold")
    console.print(
        f"{chip}; jax {facts['versions']['jax']}{torch}; {config['dtype']}, "
        f"{config['attention']} attention; data: {facts['data']}"
    )
    table = Table(*report.columns)
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for note in report.notes:
        console.print(note)
