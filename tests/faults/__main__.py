"""python -m tests.faults --rounds=N: kills runs and damages checkpoints, N times each."""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

from .harness import damage_at_random, kill_at_random, make_data, start, tiny


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--damages", type=int, default=0, help="files damaged; 0 is 2 x rounds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        damages = args.damages or 2 * args.rounds
        (folder / "data").mkdir()
        run = tiny(folder, make_data(folder / "data"))
        if start(run).wait():
            raise RuntimeError("the run to damage has failed")
        found = damage_at_random(run, folder, damages, rng)
        print(
            f"damage: {found.rounds - len(found.missed)} of {found.rounds} found, "
            f"{len(found.lost)} lost the step before",
            flush=True,
        )
        for what in (*found.missed, *found.lost):
            print("  ", what)
        keys = {"max_iters": 200, "lr_decay_iters": 200, "save_interval": 1}
        killed = kill_at_random(folder, args.rounds, rng, **keys)
        print(
            f"SIGKILL: {killed.kills} kills, {len(killed.failed)} starts after one that failed; "
            f"{killed.runs} runs came to their end, {killed.others} of them with another digit"
        )
        for errors in killed.failed:
            print("  ", errors[-2000:])
    return bool(found.missed or found.lost or killed.failed or killed.others)


if __name__ == "__main__":
    sys.exit(main())
