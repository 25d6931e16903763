"""Run one long run with a fault every few seconds; the end must equal an uninterrupted run."""

import random
import shutil
import time
from collections import Counter
from pathlib import Path

from helpers import make_data

from jaxgpt.runtime import run_dir

from .harness import again, damage, fork, outcome, tiny

SECONDS = 10  # until a fault, at most
KEYS = {"save_interval": 5, "eval_interval": 500, "log_interval": 20, "lr_decay_iters": 10**5}


class Soak:
    """A run under faults, with the number of each fault and a list of failures.

    `disk` is a small file system for the run; if given, filling the disk is also a fault.
    """

    def __init__(self, folder: Path, rng: random.Random, disk: Path | None):
        self.folder, self.rng, self.data = folder, rng, make_data(folder)
        self.config = tiny(disk or folder, self.data, "soaked", max_iters=10**6, **KEYS)
        self.checkpoints = run_dir.open_checkpoints(self.config)
        self.kinds = [self.kill, self.kill, self.terminate, self.damage]
        self.kinds += [self.fill_up] if disk else []
        self.faults, self.wrong = Counter[str](), []
        self.again, self.exit_s = 0, 0.0

    def start(self):
        """Run for a few seconds; in one of four cases the first step may not be reached."""
        process = fork(self.config, self.folder / "output")
        if self.rng.random() < 0.75:
            self.wait(process, "compiled in")
        process.join(self.rng.uniform(0, SECONDS))
        if process.exitcode is not None:
            self.note("ended", process)
        return process

    def said(self) -> str:
        return (self.folder / "output").read_text()

    def wait(self, process, line: str) -> bool:
        """Wait until the run prints `line` or ends; return whether the line was printed."""
        while process.exitcode is None and line not in self.said():
            process.join(0.1)
        return line in self.said()

    def note(self, what: str, process) -> None:
        self.wrong.append(f"{what}, exit code {process.exitcode}: {self.said()[-2000:]}")

    def kill(self) -> None:
        process = self.start()
        process.kill()
        process.join()

    def terminate(self) -> None:
        process, began = self.start(), time.monotonic()
        process.terminate()
        process.join()
        self.exit_s = max(self.exit_s, time.monotonic() - began)
        if process.exitcode not in (143, -15):  # -15 is before there was anything to save
            self.note("SIGTERM", process)
        elif process.exitcode == 143 and again(self.config) > 0:
            self.note(f"SIGTERM lost {again(self.config)} steps", process)

    def damage(self) -> None:
        self.kill()
        steps = self.checkpoints.steps()
        if len(steps) < 2:
            return
        newest, before = (self.checkpoints.folder / str(step) for step in steps[:-3:-1])
        shutil.rmtree(newest.with_suffix(".corrupt"), ignore_errors=True)
        what, process = damage(newest, before, self.rng), fork(self.config, self.folder / "output")
        self.wait(process, "resuming from")
        if f"resuming from step {before.name}\n" not in self.said():
            self.note(f"{what} of step {newest.name} was not found", process)
        process.kill()
        process.join()

    def fill_up(self) -> None:
        """Fill the disk almost completely; a run that ends must print one error line."""
        if not self.checkpoints.steps():
            return
        ballast = Path(self.config.out_dir, "ballast")
        free = shutil.disk_usage(self.config.out_dir).free - self.rng.randrange(200_000)
        ballast.write_bytes(bytes(max(0, free)))
        process = fork(self.config, self.folder / "output")
        self.wait(process, "compiled in")
        process.join(3 * SECONDS)
        if process.exitcode is not None:
            self.faults["full"] += 1
            told = [line for line in self.said().splitlines() if line.startswith("error: ")]
            if process.exitcode != 2 or self.said().splitlines()[-1:] != told:
                self.note("full disk", process)
        process.kill()
        process.join()
        ballast.unlink()

    def run(self, minutes: float) -> None:
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            fault = self.rng.choice(self.kinds)
            fault()
            self.again = max(self.again, again(self.config))
            self.faults[fault.__name__] += 1

    def ends_as_if_left_alone(self) -> bool:
        """Return whether weights, moments and metrics equal an uninterrupted run's bit for bit."""
        last = 20 + (self.checkpoints.latest() or 0)
        quiet = tiny(self.folder, self.data, "quiet", max_iters=last, **KEYS)
        ends = self.config.replace(max_iters=last), quiet
        for config in ends:
            process = fork(config, self.folder / "output")
            process.join()
            if process.exitcode:
                self.note("to the end", process)
        return outcome(ends[0]) == outcome(ends[1])


def soak(folder: Path, minutes: float, rng: random.Random, disk: Path | None = None) -> bool:
    """Run under faults and print a summary; return whether everything was correct."""
    run = Soak(folder, rng, disk)
    run.run(minutes)
    same = run.ends_as_if_left_alone()
    faults = ", ".join(f"{n} x {name}" for name, n in sorted(run.faults.items()))
    print(
        f"soak: {minutes:g} minutes, {run.checkpoints.latest()} steps, {sum(run.faults.values())} "
        f"faults ({faults}); {len(run.wrong)} not as they should be; at most {run.again} steps "
        f"taken again; SIGTERM took at most {run.exit_s:.1f} s; ends "
        f"{'with the same' if same else 'with OTHER'} weights, moments and metrics"
    )
    for what in run.wrong:
        print("  ", what)
    return same and not run.wrong
