"""Time training steps, alone or in alternation with nanoGPT.

U steps per call, M micro-batches per step, B sequences per micro-batch.
"""

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt.config import Config
from jaxgpt.data import batch_size
from jaxgpt.data.tokens import Dataset
from jaxgpt.optimizer import schedule
from jaxgpt.resolve import TRAIN, make_batches, peak_tokens_per_s
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.tools.bench.nanogpt import NanoGPT, NanoGPTError
from jaxgpt.tools.bench.report import Bench, Report, format_ratios, interleaved, quartiles
from jaxgpt.tools.hlo import Program
from jaxgpt.train_step import init_state, make_train_step

ROUND_S = 1.5  # approximate duration of a timed round of steps
PARITY_STEPS = 50


class JaxGPT:
    """jaxgpt's side of a benchmark: the trainer's batches and its compiled step."""

    def __init__(self, config: Config, dataset: Dataset):
        """Initialise the parameters and compile the step of a resolved config."""
        mesh = make_mesh(config)
        self.config, self.steps_taken = config, 0
        self.batches = make_batches(config, mesh, dataset)[TRAIN]
        self.state = init_state(config, mesh)
        self.U = self.batches.shape_UMB[0]
        self.count = jax.device_put(np.int32(self.U), NamedSharding(mesh, PartitionSpec()))
        began = time.perf_counter()
        step = make_train_step(config, mesh)
        self.step = step.lower(self.state, self.batches.get(0), self.count).compile()
        self.compile_s = time.perf_counter() - began
        self.tokens_per_step = batch_size.global_batch_size(config) * config.block_size
        self.peak_tokens_per_s = peak_tokens_per_s(config, mesh)

    def train(self, steps: int) -> tuple[float, list[float]]:
        """Take `steps`, a multiple of U, and return the seconds and the losses.

        As in training, the next call starts before the losses of the last call are read.
        """
        losses, pending = [], None
        began = time.perf_counter()
        for _ in range(0, steps, self.U):
            batch = self.batches.get(self.steps_taken)
            self.state, metrics = self.step(self.state, batch, self.count)
            self.steps_taken += self.U
            if pending is not None:
                losses += jax.device_get(pending)["loss"].tolist()
            pending = metrics
        losses += jax.device_get(pending)["loss"].tolist()
        return time.perf_counter() - began, losses

    def next_steps(self, steps: int) -> dict[str, list]:
        """Return the first tokens of the next steps' windows, [steps, M, B], and learning rates."""
        upcoming, rate = range(self.steps_taken, self.steps_taken + steps), schedule(self.config)
        starts = np.concatenate([self.batches.starts(step) for step in upcoming[:: self.U]])
        lrs = np.array([rate(step) for step in upcoming])
        shape = steps, -1, self.config.batch_size
        return {"starts": starts.reshape(shape).tolist(), "lrs": lrs.tolist()}

    def whole_calls(self, steps: int) -> int:
        """Round a number of steps up to whole calls."""
        return math.ceil(steps / self.U) * self.U

    def round_steps(self) -> int:
        """Warm up, and return how many steps take about `ROUND_S`, at most 100."""
        self.train(2 * self.U)
        call_s = self.train(2 * self.U)[0] / 2
        return self.U * max(1, min(100 // self.U, round(ROUND_S / call_s)))

    def step_ms(self, steps: int, rounds: int) -> list[float]:
        """Return the milliseconds per step of each round of `steps`."""
        return [1000 * self.train(steps)[0] / steps for _ in range(rounds)]

    def rates(self, ms: list[float]) -> dict[str, Any]:
        """Return tokens/s and MFU for either side's milliseconds per step."""
        stats, peak = quartiles(ms), self.peak_tokens_per_s
        tokens_per_s = 1000 * self.tokens_per_step / stats["median"]
        mfu = tokens_per_s / peak if peak else None
        return {"samples_ms": ms, "step_ms": stats, "tokens_per_s": tokens_per_s, "mfu": mfu}

    def summary(self, ms: list[float]) -> dict[str, Any]:
        """Return `rates`, and the memory (of one device) and the kernels of the compiled step."""
        memory: Any = self.step.memory_analysis()
        inside = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        outside = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return self.rates(ms) | {
            "compile_s": self.compile_s,
            "memory_bytes": inside + outside,
            "memory_stats": jax.local_devices()[0].memory_stats(),
            "kernels": dict(Program(self.step.as_text() or "").kernels().most_common()),
        }


def bench_training(b: Bench) -> Report:
    """Time training steps; a sample is the mean over a round of steps."""
    results: dict[str, Any] = {}
    rows, notes, ratios, ms = [], [], "", []
    b.say("compiling jaxgpt's step")
    jaxgpt = JaxGPT(b.config, b.dataset)
    if b.nanogpt:
        b.say(f"loss parity over {PARITY_STEPS} steps")
        results["parity"] = parity = loss_parity(b, jaxgpt, b.nanogpt)
        notes.append(
            f"largest difference of {PARITY_STEPS} losses, same weights and batches, dropout 0: "
            f"{parity['largest_difference']:.2g} ({b.config.dtype}); curves in {b.plot}"
        )
    steps = jaxgpt.round_steps()
    for mode in b.modes if b.nanogpt else ():
        b.say(f"jaxgpt and nanoGPT ({mode}) in turn, {steps} steps per round")
        results[mode] = found = compare(b, jaxgpt, mode, steps)
        rows.append(format_row(f"nanoGPT {mode}", found))
        notes.append(format_ratios(f"nanoGPT {mode}", found))
        if "pairs" in found:
            ms += [1000 * pair["jaxgpt_s"] / steps for pair in found["pairs"]]
            ratios += f"; {found['ratio']:.2f}x nanoGPT {mode}"
    if b.nanogpt:
        b.nanogpt.close()  # frees the device memory that it holds
    if not ms:
        b.say(f"timing jaxgpt, {steps} steps per round")
        ms = jaxgpt.step_ms(steps, 2 * b.repeats)
    mine: dict[str, Any] = jaxgpt.summary(ms) | {"steps_a_round": steps}
    results["jaxgpt"] = mine
    rows.insert(0, format_row("jaxgpt", mine))
    kernels = mine["kernels"]
    top = ", ".join(f"{count} {opcode}" for opcode, count in list(kernels.items())[:5])
    notes.append(f"{sum(kernels.values())} kernels in the compiled step: {top}")
    headline = f"{mine['step_ms']['median']:.4g} ms per step, {mine['tokens_per_s']:,.0f} tokens/s"
    size = f"{jaxgpt.tokens_per_step // b.config.block_size} x {b.config.block_size}"
    columns = [f"{size} tokens per step", "ms [quartiles]", "tokens/s", "MFU", "memory", "compile"]
    columns.append("time / jaxgpt's")
    if b.name in ("gpt2", "gpt2-xl"):  # presets, which only train on accelerators
        del jaxgpt  # frees its device memory
        results["larger_batches"] = larger_batches(b, rows, notes)
    return Report(headline + ratios, columns, rows, notes, results)


def format_row(name: str, found: dict[str, Any]) -> list[str]:
    """Return the table row of one side's results, or of its error."""
    if "error" in found:
        return [name, *["n/a"] * 6]
    ms, memory, compile_s = found["step_ms"], found["memory_bytes"], found["compile_s"]
    return [
        name,
        f"{ms['median']:.4g} [{ms['q1']:.4g}-{ms['q3']:.4g}]",
        f"{found['tokens_per_s']:,.0f}",
        f"{found['mfu']:.1%}" if found["mfu"] else "n/a",
        f"{memory / 2**20:,.0f} MiB" if memory else "n/a",
        f"{compile_s:.1f} s" if compile_s else "",
        f"{found['ratio']:.2f}" if "ratio" in found else "",
    ]


def compare(b: Bench, jaxgpt: JaxGPT, mode: str, steps: int) -> dict[str, Any]:
    """Time rounds of both sides in turn; return ratios and nanoGPT's rates, or its {"error"}."""
    nanogpt: Any = b.nanogpt
    upcoming: dict[str, list] = {}

    def jaxgpt_round() -> float:
        upcoming.update(jaxgpt.next_steps(steps))
        return jaxgpt.train(steps)[0]

    def nanogpt_round() -> float:
        return nanogpt.ask("train", **upcoming)["seconds"]  # the steps that jaxgpt has just taken

    try:
        nanogpt.load(b.config, b.dataset.train, jax.device_get(jaxgpt.state.params), mode)
        warm_up = jaxgpt.next_steps(jaxgpt.whole_calls(3))
        warm_up_s = sum(nanogpt.ask("train", **warm_up)["seconds"] for _ in range(2))
        (found,) = interleaved([jaxgpt_round], nanogpt_round, b.repeats)
        memory = nanogpt.ask("train", **warm_up)["peak_bytes"]
    except NanoGPTError as error:
        return {"error": str(error)}
    ms = [1000 * pair["nanogpt_s"] / steps for pair in found["pairs"]]
    rates = jaxgpt.rates(ms)
    warm_up_ms = 2 * len(warm_up["lrs"]) * rates["step_ms"]["median"]
    compile_s = max(0.0, warm_up_s - warm_up_ms / 1000) if mode == "compiled" else None
    return found | rates | {"memory_bytes": memory, "compile_s": compile_s}


def larger_batches(b: Bench, rows: list[list[str]], notes: list[str]) -> list[dict[str, Any]]:
    """Double the batch until it does not fit; add a row to the table for each size that fits.

    Add a note if another error ends this, so that nothing measured before is lost.
    """
    found, size = [], b.config.batch_size
    while True:
        size *= 2
        b.say(f"jaxgpt with {size} sequences")
        try:
            jaxgpt = JaxGPT(b.config.replace(batch_size=size), b.dataset)
            ms = jaxgpt.step_ms(jaxgpt.round_steps(), b.repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                notes.append(f"{size} sequences: {str(error).splitlines()[0]}")
            return found
        found.append(jaxgpt.summary(ms) | {"batch_size": size})
        rows.append(format_row(f"jaxgpt, {size} sequences", found[-1]))
        del jaxgpt


def loss_parity(b: Bench, jaxgpt: JaxGPT, nanogpt: NanoGPT) -> dict[str, Any]:
    """Compare both sides' losses with the same weights and batches, without dropout.

    `jaxgpt` must not have taken a step. If its config has dropout, a copy without is used.
    """
    if b.config.dropout:
        jaxgpt = JaxGPT(b.config.replace(dropout=0.0), b.dataset)
    nanogpt.load(jaxgpt.config, b.dataset.train, jax.device_get(jaxgpt.state.params), "eager")
    steps = jaxgpt.whole_calls(PARITY_STEPS)
    theirs = nanogpt.ask("train", **jaxgpt.next_steps(steps))["losses"][:PARITY_STEPS]
    losses = jaxgpt.train(steps)[1][:PARITY_STEPS]
    nanogpt.ask("free")
    draw_parity(b.plot, losses, theirs)
    difference = float(np.abs(np.subtract(losses, theirs)).max())
    return {"jaxgpt": losses, "nanogpt": theirs, "largest_difference": difference}


def draw_parity(file: Path, jaxgpt: list[float], nanogpt: list[float]) -> None:
    """Plot both sides' losses by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(nanogpt, "C1", linewidth=4, alpha=0.5, label="nanoGPT")
    axes.plot(jaxgpt, "C0", linewidth=1, label="jaxgpt")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.set_title("The same weights and batches")
    axes.legend(loc="upper right")
    figure.savefig(file, dpi=120)
