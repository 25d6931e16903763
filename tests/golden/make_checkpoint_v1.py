"""Write checkpoint_v1/: a run of format_version 1 that every later version must load.

Made once, from the root: python tests/golden/make_checkpoint_v1.py. Do not make it again when the
format changes: make another, of the new format, and keep this one.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.prepare import prepare
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.train import train

HERE = Path(__file__).absolute().parent / "checkpoint_v1"
KEYS = {
    "dataset": "tale",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 8,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_iters": 0,
    "max_iters": 2,
    "eval_iters": 1,
    "mesh": "data:1",
    "device": "cpu",
}


def sums(params: dict) -> dict[str, float]:
    """Return a number per parameter that changes if the parameter's elements are permuted."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    weigh = lambda a: float(np.asarray(a, np.float64).ravel() @ np.cos(np.arange(a.size)))
    return {name(path): weigh(a) for path, a in jax.tree.leaves_with_path(params)}


def main() -> None:
    with tempfile.TemporaryDirectory() as data:
        Path(data, "tale.txt").write_text("it is a tale told by an idiot\n" * 30)
        prepare(f"{data}/tale.txt", data)
        shutil.rmtree(HERE, ignore_errors=True)
        os.chdir(data)
        train(Config(out_dir="out", data_dir=".", **KEYS), {})
        shutil.copytree("out", HERE, symlinks=True)
    for name in "metrics.jsonl", "loss.png", "log.txt", ".lock":
        (HERE / name).unlink()
    saved = json.loads((HERE / "config.json").read_text()) | {"out_dir": "out", "data_dir": "data"}
    (HERE / "config.json").write_text(json.dumps(saved, indent=1))
    params, _ = run_dir.load_params(run_dir.load_config(str(HERE)), "latest", local_mesh())
    (HERE / "sums.json").write_text(json.dumps(sums(params), indent=1))


if __name__ == "__main__":
    main()
