"""What several test files share: a text, tiny configs, steps by hand, and how runs are read.

K steps in a call, M micro-batches in a step, B sequences in a micro-batch, T length.
"""

import signal
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt as ref
from reference.options import DEFAULTS

from jaxgpt import sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import prepare
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.runtime.metrics import Log, read_metrics
from jaxgpt.train_step import abstract_state, init_state, make_train_step

ROOT = Path(__file__).parents[1]
TEXT = "It is a tale told by an idiot, full of sound and fury, signifying nothing.\n" * 40
CLOCK = ("tokens_per_s", "step_ms", "mfu", "time")  # what differs from run to run

TINY = {
    "vocab_size": 31,
    "block_size": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "warmup_iters": 2,
    "max_iters": 20,
    "dtype": "float32",
    "attention": "reference",
    "mesh": "data:1",
}
RUN = {
    "dataset": "tale",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 8,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.2,
    "learning_rate": 1e-2,
    "warmup_iters": 3,
    "max_iters": 24,
    "lr_decay_iters": 24,
    "eval_interval": 8,
    "eval_iters": 2,
    "mesh": "data:2",
    "device": "cpu",
    "dtype": "float32",
    "attention": "reference",
}


# ---- configs and data ------------------------------------------------------------------------


def make_config(**keys) -> Config:
    """A tiny model and step, without data."""
    return Config(**TINY | keys)


def reference_config(**keys) -> Config:
    """A tiny model of the sizes that the NumPy GPT is compared at."""
    return Config(**DEFAULTS | {"dtype": "float32", "attention": "reference"} | keys)


def tiny_run(out_dir: Path | str, data_dir: Path | str, **keys) -> Config:
    """A run of 24 steps over `make_data`'s text, with dropout and accumulation."""
    return Config(**RUN | {"out_dir": str(out_dir), "data_dir": str(data_dir)} | keys)


def make_data(folder: Path, text: str = TEXT, name: str = "tale", tokenizer: str = "") -> Path:
    """Prepare `text` as the dataset `name`; return the folder that datasets live in."""
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare(str(folder / f"{name}.txt"), str(folder), tokenizer)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(function, *args) -> str:
    """The one line of the `UserError` that a call must raise."""
    with pytest.raises(UserError) as raised:
        function(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- steps by hand ---------------------------------------------------------------------------


def make_windows(config: Config, *, steps: int = 1, micro: int = 2, seed: int = 0) -> jax.Array:
    """Random windows_KMBT: `steps` steps of 8 sequences in `micro` micro-batches."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, config.vocab_size, (steps, 8, config.block_size + 1))
    return jnp.asarray(windows.reshape(steps, micro, 8 // micro, -1), jnp.int32)


def call_step(step, state, windows_KMBT):
    """Take all steps of the windows in one call."""
    return step(state, {"windows": windows_KMBT}, jnp.int32(len(windows_KMBT)))


def take_steps(config: Config, batches: Iterable) -> tuple:
    """Train on these windows_KMBT from a fresh state; return the state and a row per step."""
    mesh = sharding.make_mesh(config)
    state, step, rows = init_state(config, mesh), make_train_step(config, mesh), []
    for windows_KMBT in batches:
        state, metrics = call_step(step, state, windows_KMBT)
        metrics = jax.device_get(metrics)
        rows += [{k: v[i] for k, v in metrics.items()} for i in range(len(windows_KMBT))]
    return jax.device_get(state), rows


def stacked(params: dict) -> dict:
    """The parameters as `scan_layers` keeps them."""
    blocks = params["blocks"].values()
    return params | {"blocks": jax.tree.map(lambda *layers: np.stack(layers), *blocks)}


def assert_trees_close(ours: dict, theirs: dict, atol: float) -> None:
    theirs = ref.flatten(theirs)
    for path, value in ref.flatten(ours).items():
        np.testing.assert_allclose(value, theirs.pop(path), rtol=0, atol=atol, err_msg=path)
    assert not theirs


# ---- whole runs ------------------------------------------------------------------------------


def all_rows(config: Config) -> list[dict]:
    return read_metrics(Path(config.out_dir, "metrics.jsonl"))


def rows_of(config: Config) -> list[dict]:
    """The rows of a run's metrics, without what a clock says."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in all_rows(config)]


def log_of(config: Config) -> str:
    return Path(config.out_dir, "log.txt").read_text(encoding="utf-8")


def state_of(run: Config | Checkpoints, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, parameters and moments, as bytes by path."""
    checkpoints = run_dir.open_checkpoints(run) if isinstance(run, Config) else run
    config = Config(**checkpoints.meta(step)["config"])
    abstract = abstract_state(config, sharding.make_mesh(config))
    items = {name: abstract[name] for name in ("params", "opt_state")}
    leaves = jax.tree.leaves_with_path(checkpoints.restore(items, step))
    return {jax.tree_util.keystr(path): np.asarray(array).tobytes() for path, array in leaves}


def params_of(config: Config, checkpoint: str = "latest") -> dict[str, np.ndarray]:
    """The parameters of a run's checkpoint, by path."""
    saved = run_dir.load_config(config.out_dir)
    params, _ = run_dir.load_params(saved, checkpoint, sharding.local_mesh())
    return ref.flatten(jax.device_get(params))


def stop_at(monkeypatch, *steps: int) -> None:
    """Send SIGTERM while these steps are logged, once each."""
    left, log = list(steps), Log.train

    def train(self, row, left_s):
        log(self, row, left_s)
        if left and row["step"] == left[0]:
            signal.raise_signal(signal.SIGTERM)
            left.pop(0)

    monkeypatch.setattr(Log, "train", train)
