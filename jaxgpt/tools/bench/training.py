"""Timed training: jaxgpt's own trainer, alone or in turn with nanoGPT.

K steps of a dispatch, B batch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import sharding
from jaxgpt.config import Config
from jaxgpt.data.tokens import Dataset
from jaxgpt.optimizer import schedule
from jaxgpt.tools.bench.nanogpt import NanoGPT, NanoGPTError, format_ratios, interleaved
from jaxgpt.tools.hlo import Program
from jaxgpt.train import TRAIN, Trainer
from jaxgpt.train_step import make_train_step

ROUND_S = 1.5  # about what a round of steps takes
PARITY_STEPS = 50


@dataclass
class Report:
    """What a benchmark found: a line, a table, lines below it, and all of it for JSON."""

    headline: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    results: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is to be timed: a resolved config, its data, and nanoGPT's process if there is one."""

    name: str
    config: Config
    dataset: Dataset
    nanogpt: NanoGPT | None = None
    modes: tuple[str, ...] = ()
    pairs: int = 5
    plot: Path = Path("bench.png")
    say: Callable[[str], None] = field(default=lambda text: None)


def quartiles(samples: list[float]) -> dict[str, float]:
    q1, median, q3 = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "q1": q1, "q3": q3}


class JaxGPT:
    """jaxgpt's side: train.py's trainer and its jitted step, stepped by hand."""

    def __init__(self, config: Config, dataset: Dataset):
        unused: Any = None  # checkpoints, log, signals
        self.config, mesh = config, sharding.make_mesh(config)
        self.trainer = Trainer(config, mesh, dataset, unused, unused, unused)
        self.trainer.start(0, None)
        self.K, self.batches = self.trainer.steps, self.trainer.batches[TRAIN]
        self.count = jax.device_put(np.int32(self.K), NamedSharding(mesh, PartitionSpec()))
        began = time.perf_counter()
        step = make_train_step(config, mesh)
        self.step = step.lower(self.trainer.state, self.batches.get(0), self.count).compile()
        self.compile_s = time.perf_counter() - began

    def train(self, steps: int) -> tuple[float, list[float]]:
        """Takes steps -> seconds, losses. As in training, one dispatch is always under way."""
        t, losses, pending = self.trainer, [], None
        began = time.perf_counter()
        for _ in range(0, steps, self.K):
            t.state, metrics = self.step(t.state, self.batches.get(t.step), self.count)
            t.step += self.K
            if pending is not None:
                losses += jax.device_get(pending)["loss"][: self.K].tolist()
            pending = metrics
        losses += jax.device_get(pending)["loss"][: self.K].tolist()
        return time.perf_counter() - began, losses

    def next_steps(self, steps: int) -> dict[str, list]:
        """Where the next steps' windows start, [steps, micro-batch, B]; their learning rates."""
        first, rate = self.trainer.step, schedule(self.config)
        starts = [self.batches.starts(n) for n in range(first, first + steps, self.K)]
        shape = steps, -1, self.config.batch_size
        return {
            "starts": np.concatenate(starts).reshape(shape).tolist(),
            "lrs": np.array([rate(n) for n in range(first, first + steps)]).tolist(),
        }

    def params(self) -> dict[str, Any]:
        """The parameters now, as NumPy arrays."""
        return jax.device_get(self.trainer.state["params"])

    def round_steps(self) -> int:
        """Warms up -> how many steps a round should have."""
        self.train(2 * self.K)
        dispatch_s = self.train(2 * self.K)[0] / 2
        return self.K * max(1, min(100 // self.K, round(ROUND_S / dispatch_s)))

    def rates(self, ms: list[float]) -> dict[str, Any]:
        """What these samples of a step's milliseconds come to, whichever side they are of."""
        stats, peak = quartiles(ms), self.trainer.peak_tokens
        tokens_per_s = self.trainer.sequences * self.config.block_size / stats["median"] * 1000
        mfu = tokens_per_s / peak if peak else None
        return {"samples_ms": ms, "step_ms": stats, "tokens_per_s": tokens_per_s, "mfu": mfu}

    def summary(self, ms: list[float]) -> dict[str, Any]:
        """`rates`, and what the compiled step says of itself; memory is that of one device."""
        memory: Any = self.step.memory_analysis()
        inside = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        outside = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return self.rates(ms) | {
            "compile_s": self.compile_s,
            "memory_bytes": inside + outside,
            "memory_stats": jax.local_devices()[0].memory_stats(),
            "kernels": dict(Program(self.step.as_text() or "").kernels().most_common()),
        }


def train(b: Bench) -> Report:
    """Whole training steps, each sample the mean of a round of them."""
    results: dict[str, Any] = {}
    notes, rows = [], []
    b.say("compiling jaxgpt's step")
    ours = JaxGPT(b.config, b.dataset)
    if b.nanogpt:
        b.say(f"loss parity over {PARITY_STEPS} steps")
        results["parity"] = parity = loss_parity(b, ours, b.nanogpt)
        notes.append(
            f"largest difference of {PARITY_STEPS} losses, same weights and batches, dropout 0: "
            f"{parity['largest_difference']:.2g} ({b.config.dtype}); curves in {b.plot}"
        )
    steps, ms = ours.round_steps(), []
    for mode in b.modes if b.nanogpt else ():
        b.say(f"jaxgpt and nanoGPT ({mode}) in turn, {steps} steps a round")
        results[mode] = found = against(b, ours, mode, steps)
        ms += [1000 * pair["jaxgpt_s"] / steps for pair in found.get("pairs", ())]
        failed = [f"nanoGPT {mode}", *["n/a"] * 6]
        rows.append(row_of(f"nanoGPT {mode}", found) if "pairs" in found else failed)
        notes.append(format_ratios(f"nanoGPT {mode}", found))
    if b.nanogpt:
        b.nanogpt.close()  # its memory is jaxgpt's now
    if not ms:
        b.say(f"timing jaxgpt, {steps} steps a round")
        ms = [1000 * ours.train(steps)[0] / steps for _ in range(2 * b.pairs)]
    mine: dict[str, Any] = ours.summary(ms) | {"steps_a_round": steps}
    results["jaxgpt"] = mine
    rows.insert(0, row_of("jaxgpt", mine))
    notes.append(format_kernels(mine["kernels"]))
    headline = [f"{mine['step_ms']['median']:.4g} ms a step, {mine['tokens_per_s']:,.0f} tokens/s"]
    headline += [
        f"{results[m]['ratio']:.2f}x nanoGPT {m}" for m in b.modes if "pairs" in results.get(m, ())
    ]
    columns = [f"{ours.trainer.sequences} x {b.config.block_size} tokens a step"]
    columns += ["ms [quartiles]", "tokens/s", "MFU", "memory", "compile", "time / jaxgpt's"]
    if b.name.startswith("gpt2"):
        del ours
        results["larger_batches"] = larger_batches(b, rows)
    return Report("; ".join(headline), columns, rows, notes, results)


def row_of(name: str, found: dict[str, Any]) -> list[str]:
    ms, mfu, memory, seconds = (found[k] for k in ("step_ms", "mfu", "memory_bytes", "compile_s"))
    return [
        name,
        f"{ms['median']:.4g} [{ms['q1']:.4g}-{ms['q3']:.4g}]",
        f"{found['tokens_per_s']:,.0f}",
        f"{mfu:.1%}" if mfu else "n/a",
        f"{memory / 2**20:,.0f} MiB" if memory else "n/a",
        f"{seconds:.1f} s" if seconds else "",
        f"{found['ratio']:.2f}" if "ratio" in found else "",
    ]


def against(b: Bench, ours: JaxGPT, mode: str, steps: int) -> dict[str, Any]:
    """Rounds of both sides in turn, or {"error"} with what keeps nanoGPT from running."""
    nanogpt: Any = b.nanogpt
    upcoming: dict[str, list] = {}

    def our_round() -> float:
        upcoming.update(ours.next_steps(steps))  # nanoGPT takes the very steps that we take
        return ours.train(steps)[0]

    their_round = lambda: nanogpt.ask("train", **upcoming)["seconds"]
    try:
        nanogpt.load(b.config, b.dataset.train, ours.params(), mode)
        warm = ours.next_steps(-(-3 // ours.K) * ours.K)
        warm_up_s = sum(nanogpt.ask("train", **warm)["seconds"] for _ in range(2))
        (found,) = interleaved([our_round], their_round, b.pairs)
        memory = nanogpt.ask("train", **warm)["peak_bytes"]
    except NanoGPTError as error:
        return {"error": str(error)}
    compile_s = warm_up_s if mode == "compiled" else None
    timing = ours.rates([1000 * pair["nanogpt_s"] / steps for pair in found["pairs"]])
    return found | timing | {"memory_bytes": memory, "compile_s": compile_s}


def larger_batches(b: Bench, rows: list[list[str]]) -> list[dict[str, Any]]:
    """Doubles the batch until it does not fit; adds a row to the table for each that does."""
    found, size = [], b.config.batch_size
    while True:
        size *= 2
        b.say(f"jaxgpt with {size} sequences")
        try:
            ours = JaxGPT(b.config.replace(batch_size=size), b.dataset)
            steps = ours.round_steps()
            ms = [1000 * ours.train(steps)[0] / steps for _ in range(b.pairs)]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return found
        found.append(ours.summary(ms) | {"batch_size": size})
        rows.append(row_of(f"jaxgpt, {size} sequences", found[-1]))
        del ours


def loss_parity(b: Bench, ours: JaxGPT, nanogpt: NanoGPT) -> dict[str, Any]:
    """Both sides' losses from the same weights, on the same batches, without dropout.

    `ours` has yet to take its first step; if it has dropout, another takes its place.
    """
    if b.config.dropout:
        ours = JaxGPT(b.config.replace(dropout=0.0), b.dataset)
    nanogpt.load(ours.config, b.dataset.train, ours.params(), "eager")
    upcoming = ours.next_steps(-(-PARITY_STEPS // ours.K) * ours.K)
    theirs = nanogpt.ask("train", **upcoming)["losses"][:PARITY_STEPS]
    losses = ours.train(len(upcoming["lrs"]))[1][:PARITY_STEPS]
    nanogpt.ask("free")
    draw_parity(b.plot, losses, theirs)
    difference = float(np.abs(np.subtract(losses, theirs)).max())
    return {"jaxgpt": losses, "nanogpt": theirs, "largest_difference": difference}


def draw_parity(file: Path, ours: list[float], theirs: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(theirs, "C1", linewidth=4, alpha=0.5, label="nanoGPT")
    axes.plot(ours, "C0", linewidth=1, label="jaxgpt")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.set_title("The same weights and batches")
    axes.legend(loc="upper right")
    figure.savefig(file, dpi=120)


def format_kernels(kernels: dict[str, int]) -> str:
    top = ", ".join(f"{n} {opcode}" for opcode, n in list(kernels.items())[:5])
    return f"{sum(kernels.values())} kernels in the compiled step: {top}"
