"""Kill runs and damage checkpoints, for the tests and the command in __main__.py."""

import json
import multiprocessing
import os
import random
import re
import shutil
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
from helpers import make_data, rows_of, state_of, tiny_run

from jaxgpt.cli import commands as cli
from jaxgpt.config import Config
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.train import train

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def tiny(folder: Path, data: Path, name: str = "run", **keys) -> Config:
    """Return the config of a run of 24 steps that saves every third step and can be restarted."""
    return tiny_run(folder / name, data, **{"init_from": "auto", "save_interval": 3} | keys)


def fork(config: Config, output: Path):
    """Start the run in a forked process with all imports done; write the prints to `output`."""
    output.write_text("")  # remove the output of the run before
    process = FORKS.Process(target=_forked, args=(config, output))
    process.start()
    return process


def _forked(config: Config, output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    jax.config.update("jax_num_cpu_devices", 2)
    cli.run(lambda argv: train(config), [])


def outcome(config: Config) -> tuple[list[dict], dict[str, bytes]]:
    """Return the metrics of a finished run and every array of the last step."""
    return rows_of(config), state_of(config, run_dir.open_checkpoints(config).steps()[-1])


def resumed_from(output: str) -> int:
    """Return the step that a run said it resumed from, or 0."""
    found = re.search(r"resuming from step (\d+)", output)
    return int(found[1]) if found else 0


def again(config: Config) -> int:
    """Return the number of logged steps that the next start repeats."""
    rows = rows_of(config)
    return rows[-1]["step"] - (run_dir.open_checkpoints(config).latest() or 0) if rows else 0


class Killed(NamedTuple):
    """Results of killing runs: number of kills, outputs of failed starts, finished runs.

    `others` counts finished runs that differ in any digit from the uninterrupted run. `again` is
    the largest number of steps that a start had to repeat.
    """

    kills: int
    failed: list[str]
    runs: int
    others: int
    again: int


def kill_at_random(folder: Path, rounds: int, rng: random.Random, **keys) -> Killed:
    """Send SIGKILL `rounds` times at random moments of runs that save often; return the results.

    A start that does not resume from the newest step that was saved has failed.
    """
    data, output = make_data(folder), folder / "output"
    quiet, config = (tiny(folder, data, name, **keys) for name in ("quiet", "killed"))
    for _ in range(2):  # the first one fills the compilation cache
        shutil.rmtree(quiet.out_dir, ignore_errors=True)
        began, process = time.perf_counter(), fork(quiet, output)
        process.join()
        lasts = time.perf_counter() - began
        if process.exitcode:
            raise RuntimeError(f"the run that is left alone has failed: {output.read_text()}")
    whole, kills, failed, runs, others, most, saved = outcome(quiet), 0, [], 0, 0, 0, 0
    while kills < rounds or not runs:
        process = fork(config, output)
        process.join(rng.uniform(0, lasts) if kills < rounds else None)
        is_killed = process.exitcode is None
        if is_killed:
            process.kill()
            process.join()
        said = output.read_text()
        if "compiled in" in said and resumed_from(said) != saved:
            failed.append(f"step {saved} was saved, but: {said}")
        if is_killed:
            kills, most = kills + 1, max(most, again(config))
            saved = run_dir.open_checkpoints(config).latest() or 0
            continue
        if process.exitcode:
            failed.append(output.read_text())
        else:
            runs, others = runs + 1, others + (outcome(config) != whole)
        shutil.rmtree(config.out_dir)
        saved = 0
    return Killed(kills, failed, runs, others, most)


FAULTS = ("flip", "flip", "flip", "flip", "truncate", "empty", "delete", "swap")


def damage(newest: Path, before: Path, rng: random.Random) -> str:
    """Damage a file of a step and return the damage; a swap copies a file of another step."""
    kind = rng.choice(FAULTS)
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    other = {p: before / p.relative_to(newest) for p in files}
    if kind == "swap":
        is_other = lambda p: other[p].is_file() and p.read_bytes() != other[p].read_bytes()
        files = list(filter(is_other, files))
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif kind == "truncate":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "delete":
        file.unlink()
    else:
        file.write_bytes(other[file].read_bytes())
    return f"{kind} {file.relative_to(newest)}"


def sign_again(step: Path) -> None:
    """Write the digest of the current files, as a forger of a checkpoint would."""
    (step / "digest.json").unlink(missing_ok=True)
    files = {str(p.relative_to(step)): p.read_bytes() for p in step.rglob("*") if p.is_file()}
    sums = {name: {"size": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()}
    (step / "digest.json").write_text(json.dumps(sums))


def damage_at_random(
    run: Config, scratch: Path, rounds: int, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Damage the newest step of copies of a run directory; check which step a run resumes from.

    Return the damages that were not detected, and the damages that lost the step before.
    """
    source, missed, lost = run_dir.open_checkpoints(run), [], []
    before, newest = source.steps()[-2:]
    whole = state_of(source, before)
    for _ in range(rounds):
        folder = scratch / "damaged" / "checkpoints"
        shutil.copytree(source.folder, folder, symlinks=True)
        what = damage(folder / str(newest), folder / str(before), rng)
        checkpoints = Checkpoints(folder)
        checkpoints.quarantine_corrupt()
        if checkpoints.newest == newest:
            missed.append(what)
        elif checkpoints.newest != before or state_of(checkpoints, before) != whole:
            lost.append(what)
        shutil.rmtree(folder)
    return missed, lost
