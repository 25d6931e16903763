"""Kill runs and damage checkpoints, run one long run under faults, or read a large dataset.

python -m tests.faults --rounds=50
python -m tests.faults --soak=30 [--disk=FOLDER, a small file system to fill up]
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
from .large import read_large
from .soak import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--damages", type=int, help="files damaged; default: 2 x rounds")
    parser.add_argument("--soak", type=float, default=0, help="minutes of a soak, instead")
    parser.add_argument("--disk", type=Path, help="a small file system for the soak to fill up")
    parser.add_argument("--tokens", type=int, default=0, help="read sparse shards, instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{name}/compiled")
        folder = Path(name)
        if args.soak:
            return not soak(folder, args.soak, rng, args.disk)
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
