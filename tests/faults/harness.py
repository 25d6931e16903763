"""Runs that are killed and checkpoints that are damaged: what the tests and the command share."""

import json
import multiprocessing
import os
import random
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
    """A run of 24 steps that saves at every third and may be started again and again."""
    return tiny_run(folder / name, data, **{"init_from": "auto", "save_interval": 3} | keys)


def fork(config: Config, output: Path):
    """The run in a process that need not import anything; what it prints goes to a file."""
    output.write_text("")  # what the run before it said is not this one's
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
    """All that a whole run leaves: its metrics, and every array of its last step."""
    return rows_of(config), state_of(config, run_dir.open_checkpoints(config).steps()[-1])


def again(config: Config) -> int:
    """Steps that were reported and that the next start takes again."""
    rows = rows_of(config)
    return rows[-1]["step"] - (run_dir.open_checkpoints(config).latest() or 0) if rows else 0


class Killed(NamedTuple):
    """What came of runs that were killed: kills, starts after one that failed, whole runs.

    `others` are whole runs with another digit somewhere than the run that was left alone, `again`
    the most steps that had to be taken a second time.
    """

    kills: int
    failed: list[str]
    runs: int
    others: int
    again: int


def kill_at_random(folder: Path, rounds: int, rng: random.Random, **keys) -> Killed:
    """SIGKILL, over and over, at random moments of runs that save all the time."""
    data, output = make_data(folder), folder / "output"
    quiet, config = (tiny(folder, data, name, **keys) for name in ("quiet", "killed"))
    for _ in range(2):  # the first one fills the compilation cache
        shutil.rmtree(quiet.out_dir, ignore_errors=True)
        began, process = time.perf_counter(), fork(quiet, output)
        process.join()
        lasts = time.perf_counter() - began
        if process.exitcode:
            raise RuntimeError(f"the run that is left alone has failed: {output.read_text()}")
    whole, kills, failed, runs, others, most = outcome(quiet), 0, [], 0, 0, 0
    while kills < rounds or not runs:
        process = fork(config, output)
        process.join(rng.uniform(0, lasts) if kills < rounds else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills, most = kills + 1, max(most, again(config))
            continue
        if process.exitcode:
            failed.append(output.read_text())
        else:
            runs, others = runs + 1, others + (outcome(config) != whole)
        shutil.rmtree(config.out_dir)
    return Killed(kills, failed, runs, others, most)


FAULTS = ("flip", "flip", "flip", "flip", "truncate", "empty", "delete", "swap")


def damage(newest: Path, before: Path, rng: random.Random) -> str:
    """Does one thing to one file of a step -> what. A swap puts there the file of another step."""
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
    """Write the digest of what is there now, as whoever forges a checkpoint would."""
    (step / "digest.json").unlink(missing_ok=True)
    files = {str(p.relative_to(step)): p.read_bytes() for p in step.rglob("*") if p.is_file()}
    sums = {name: {"size": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()}
    (step / "digest.json").write_text(json.dumps(sums))


def damage_at_random(
    run: Config, scratch: Path, rounds: int, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Damages the newest step of copies of a run directory, and looks what a run would go on from.

    Returns what was missed, after which that step is still used, and what lost the step before.
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
