"""Kill runs of configs/shakespeare.py in a bucket, and compare their end with a local run."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from helpers import CHILD_ENV, ROOT, state_of
from object_store import Files, ObjectStore

from jaxgpt.runtime import run_dir, storage

STEPS = 2000  # of the config on a CPU
STEP = re.compile(r"step (\d+): loss")
RESUMED = re.compile(r"resuming from step (\d+)")


def kill_in_bucket(folder: Path, kills: int, rng: random.Random) -> bool:
    """Kill a run at `kills` random steps; print from where it resumed, and return success."""
    folder.mkdir()
    store = ObjectStore()
    os.environ.update(store.env)
    storage.MIRRORS = folder / "mirrors"  # of this process, which only reads
    Files(store, "bucket")  # makes the bucket

    local, remote = str(folder / "local"), "s3://bucket/run"
    _wait_for_end(_start(folder, local))
    resumed = []
    for step in sorted(rng.sample(range(1, STEPS - 50), kills)):
        process = _start(folder, remote)
        resumed.append(_kill_after(process, step, rng.uniform(0, 1)))
        print(f"killed after step {step}, resumed from {resumed[-1]}", flush=True)
    _wait_for_end(_start(folder, remote))

    storage.open_to_read(remote)
    runs = [run_dir.load_config(out_dir) for out_dir in (local, remote)]
    last = [run_dir.open_checkpoints(run).latest() for run in runs]
    is_equal = last[0] == last[1] and state_of(runs[0], last[0]) == state_of(runs[1], last[1])
    print(f"{kills} kills, {sum(step > 0 for step in resumed)} of them in a run that had resumed")
    print(f"every bit of step {last[1]} is equal to that of a local run: {is_equal}")
    readable = all(_can_read(folder, remote, command) for command in READERS)
    store.stop()
    return is_equal and readable


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
    resumed_from, output = 0, []
    for line in process.stdout:
        output.append(line)
        if found := RESUMED.search(line):
            resumed_from = int(found[1])
        found = STEP.search(line)
        if found and int(found[1]) >= step:
            time.sleep(delay_s)
            process.kill()
            process.communicate()
            return resumed_from
    raise RuntimeError(f"the run ended before step {step}: {''.join(output)[-2000:]}")


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
