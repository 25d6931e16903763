"""Kill runs of configs/shakespeare.py in a bucket, and compare their end with a local run."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from helpers import CHILD_ENV, ROOT
from object_store import Files, ObjectStore

from jaxgpt.config import Config
from jaxgpt.runtime import run_dir, storage

from .harness import outcome, resumed_from

STEPS = 2000  # of the config on a CPU
STEP = re.compile(r"step (\d+): loss")


def kill_in_bucket(folder: Path, kills: int, rng: random.Random) -> bool:
    """Kill a run after `kills` random steps; print what happened, and return success."""
    folder.mkdir()
    store = ObjectStore()
    os.environ.update(store.env)
    storage.MIRRORS = folder / "mirrors"  # of this process, which only reads
    Files(store, "bucket")  # makes the bucket

    local, remote = str(folder / "local"), "s3://bucket/run"
    _wait_for_end(_start(folder, local))
    saved, num_resumed, all_resume = 0, 0, True
    for step in sorted(rng.sample(range(1, STEPS - 50), kills)):
        process = _start(folder, remote)
        resumed = _kill_after(process, step, rng.uniform(0, 1))
        print(f"resumed from step {resumed}, killed after step {step}", flush=True)
        num_resumed += resumed > 0
        all_resume &= resumed == saved
        saved = newest_step(run_dir.load_config(local).replace(out_dir=remote))
    _wait_for_end(_start(folder, remote))

    quiet, killed = [run_dir.load_config(out_dir) for out_dir in (local, remote)]
    is_equal = outcome(killed) == outcome(quiet)
    print(f"{kills} kills, {num_resumed} of them in a run that had resumed")
    print(f"every start resumed from the newest step in the bucket: {all_resume}")
    print(f"every bit of the last step, and every row, are those of a local run: {is_equal}")
    readable = all(_can_read(folder, remote, command) for command in READERS)
    store.stop()
    return all_resume and is_equal and readable


def newest_step(config: Config) -> int:
    """Return the newest complete step of a run in a bucket, or 0."""
    storage.open_to_read(config.out_dir)
    return run_dir.open_checkpoints(config).latest() or 0


def _start(folder: Path, out_dir: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", "configs/shakespeare.py"]
    command += [f"--out_dir={out_dir}", "--init_from=auto"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=_env(folder), **pipes)


def _env(folder: Path) -> dict[str, str]:
    """Return an environment whose mirrors of buckets are below `folder`."""
    return CHILD_ENV | os.environ | {"HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}


def _kill_after(process: subprocess.Popen, step: int, delay_s: float) -> int:
    """Send SIGKILL `delay_s` after this step is logged; return the step the run resumed from."""
    output = ""
    for line in process.stdout:
        output += line
        found = STEP.search(line)
        if found and int(found[1]) >= step:
            time.sleep(delay_s)
            process.kill()
            process.communicate()
            return resumed_from(output)
    raise RuntimeError(f"the run ended before step {step}: {output[-2000:]}")


def _wait_for_end(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a run failed: {output[-2000:]}")


READERS = (
    ["sample.py", "--max_new_tokens=40"],
    ["-m", "jaxgpt", "eval"],
    ["-m", "jaxgpt", "report"],
)


def _can_read(folder: Path, out_dir: str, command: list[str]) -> bool:
    where = [out_dir] if command[-1] == "report" else [f"--out_dir={out_dir}"]
    whole = [sys.executable, *command, *where]
    done = subprocess.run(whole, cwd=ROOT, env=_env(folder), capture_output=True, text=True)
    print(f"{' '.join(command)} of {out_dir}: exit code {done.returncode}")
    if done.returncode:
        print(done.stderr[-2000:])
    return not done.returncode
