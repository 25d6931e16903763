"""Start many processes of one run on this machine, stop them, kill one of them, and resume."""

import random
import signal
import time
from pathlib import Path

from helpers import make_data
from processes import TRAIN_PATIENTLY, Run

TIMEOUT_S = 1800


def start_and_end(folder: Path, count: int, rng: random.Random) -> bool:
    """Stop a run of `count` processes, then kill one of them; print times, return success."""
    folder.mkdir()
    (folder / "data").mkdir()
    make_data(folder / "data", "the quality of mercy is not strained\n" * 40, "verse")
    keys = {"gradient_accumulation_steps": count, "batch_size": 1, "init_from": "auto"}
    keys |= {"sample_every": 0, "save_interval": 20, "eval_interval": 1000}
    endless = _flags(keys | {"max_iters": 1_000_000})

    run, first_s = _start(folder, count, endless, after=0)
    stopped = rng.randrange(count)
    began = time.perf_counter()
    run.processes[stopped].send_signal(signal.SIGTERM)
    codes = run.wait(TIMEOUT_S)
    stop_s = time.perf_counter() - began
    saved = _last_saved(folder)
    steps = _last_logged(run)
    all_stopped = codes == [128 + signal.SIGTERM] * count and saved == steps
    print(f"start: {count} processes took their first steps after {first_s:.1f} s")
    print(f"stop: process {stopped} got SIGTERM; all left after {stop_s:.1f} s")
    print(f"  with codes {set(codes)}, and step {steps} is saved: {all_stopped}", flush=True)

    run, again_s = _start(folder, count, endless, after=saved)
    killed = rng.randrange(1, count)
    began = time.perf_counter()
    run.processes[killed].kill()
    codes = run.wait(TIMEOUT_S)
    death_s = time.perf_counter() - began
    others = [code for number, code in enumerate(codes) if number != killed]
    all_ended = 0 not in others and not any("Traceback" in error for error in run.errors)
    print(f"resume: {count} processes took the next steps after {again_s:.1f} s")
    print(f"death: process {killed} was killed; all others left after {death_s:.1f} s")
    print(f"  with codes {set(others)}, without a traceback: {all_ended}", flush=True)

    saved = _last_saved(folder)
    run = Run(folder, "run", 1, *_flags(keys | {"max_iters": saved + 20}), devices=1)
    codes = run.wait(TIMEOUT_S)
    last_log = (folder / "run" / "log.txt").read_text().rpartition("device: ")[2]
    resumed = codes == [0] and f"resuming from step {saved}\n" in last_log
    print(f"resume: one process goes on from step {saved}: {resumed}")
    return all_stopped and all_ended and resumed


def _flags(keys: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def _start(folder: Path, count: int, flags: list[str], after: int) -> tuple[Run, float]:
    """Start a run and wait until it has logged a step later than `after`; return the seconds."""
    began = time.perf_counter()
    run = Run(folder, "run", count, *flags, devices=1, script=TRAIN_PATIENTLY)
    while _last_logged(run) <= after:
        ended = [number for number, process in enumerate(run.processes) if process.poll()]
        if ended or time.perf_counter() > began + TIMEOUT_S:
            for process in run.processes:
                process.kill()
            run.wait()
            raise RuntimeError(f"processes {ended} ended: {[run.errors[i] for i in ended]}")
        time.sleep(0.2)
    return run, time.perf_counter() - began


def _last_logged(run: Run) -> int:
    if not (run.folder / "metrics.jsonl").exists():
        return 0
    return max((step for step, key in run.losses() if key == "loss"), default=0)


def _last_saved(folder: Path) -> int:
    digests = (folder / "run" / "checkpoints").glob("[0-9]*/digest.json")
    return max(int(digest.parent.name) for digest in digests)
