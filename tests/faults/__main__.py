"""Test and measure what is too long for pytest; without another flag, kills and damage.

python -m tests.faults --rounds=50
python -m tests.faults --soak=30 [--disk=FOLDER, a small file system to fill up]
python -m tests.faults --bucket=10
python -m tests.faults --processes=64
python -m tests.faults --saves=configs/gpt2.py
python -m tests.faults --tokens=10_000_000_000
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does, for `helpers`

from helpers import make_data

from .harness import damage_at_random, fork, kill_at_random, tiny
from .in_bucket import kill_in_bucket
from .large import read_large
from .many_processes import start_and_end
from .saves import measure_saves
from .soak import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--damages", type=int, help="files damaged; default: 2 x rounds")
    parser.add_argument("--soak", type=float, default=0, help="minutes of a soak test")
    parser.add_argument("--disk", type=Path, help="a small file system for the soak to fill up")
    parser.add_argument("--bucket", type=int, default=0, help="SIGKILLs of a run in a bucket")
    parser.add_argument("--processes", type=int, default=0, help="processes of one run")
    parser.add_argument("--saves", default="", help="a config file, to measure what saves cost")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of sparse shards to read")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{name}/compiled")
        folder = Path(name)
        if args.soak:
            return not soak(folder, args.soak, rng, args.disk)
        if args.bucket:
            return not kill_in_bucket(folder / "bucket", args.bucket, rng)
        if args.processes:
            return not start_and_end(folder / "processes", args.processes, rng)
        if args.saves:
            return not measure_saves(folder / "saves", args.saves)
        if args.tokens:
            return not read_large(folder / "sparse", args.tokens)
        damages = 2 * args.rounds if args.damages is None else args.damages
        damaged = not damages or _damage(folder / "damage", damages, rng)
        killed = not args.rounds or _kill(folder / "kill", args.rounds, rng)
        return not (damaged and killed)


def _damage(folder: Path, rounds: int, rng: random.Random) -> bool:
    folder.mkdir()
    run = tiny(folder, make_data(folder))
    fork(run, folder / "output").join()
    missed, lost = damage_at_random(run, folder, rounds, rng)
    found = f"{rounds - len(missed)} of {rounds} found"
    print(f"damage: {found}, {len(lost)} lost the step before", flush=True)
    for what in missed + lost:
        print("  ", what)
    return not (missed or lost)


def _kill(folder: Path, rounds: int, rng: random.Random) -> bool:
    folder.mkdir()
    keys = {"max_iters": 200, "lr_decay_iters": 200, "save_interval": 1}
    killed = kill_at_random(folder, rounds, rng, **keys)
    print(
        f"SIGKILL: {killed.kills} kills, {len(killed.failed)} starts after one that failed, at "
        f"most {killed.again} steps taken again; {killed.runs} runs came to their end, "
        f"{killed.others} of them with another digit"
    )
    for errors in killed.failed:
        print("  ", errors[-2000:])
    return not (killed.failed or killed.others)


if __name__ == "__main__":
    sys.exit(main())
