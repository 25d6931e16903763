"""Provide a text, tiny configs, single training steps and readers of runs for the tests.

U steps per call, M micro-batches per step, B sequences per micro-batch, T length.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import numpy_gpt as ref
from reference.options import DEFAULTS

from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import prepare
from jaxgpt.evaluate import Evaluator
from jaxgpt.loss import cross_entropy
from jaxgpt.model import abstract_model
from jaxgpt.runtime import run_dir, storage
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.runtime.files import is_url
from jaxgpt.runtime.mesh import local_mesh, make_mesh
from jaxgpt.runtime.metrics import Log, read_metrics
from jaxgpt.train_step import abstract_state, init_state, make_train_step

ROOT = Path(__file__).parents[1]
TEXT = "It is a tale told by an idiot, full of sound and fury, signifying nothing.\n" * 40
PATHS = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
CHILD_ENV = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}  # imports jaxgpt from anywhere
CLOCK = (
    "tokens_per_s",
    "step_ms",
    "mfu",
    "train_s",
    "total_s",
    "time",
)  # these differ from run to run

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
    """Return the config of a tiny model and training step, without data."""
    return Config(**TINY | keys)


def reference_config(**keys) -> Config:
    """Return the config of a tiny model with the sizes of the NumPy comparisons."""
    return Config(**DEFAULTS | {"dtype": "float32", "attention": "reference"} | keys)


def tiny_run(out_dir: Path | str, data_dir: Path | str, **keys) -> Config:
    """Return the config of a run of 24 steps on `TEXT`, with dropout and accumulation."""
    return Config(**RUN | {"out_dir": str(out_dir), "data_dir": str(data_dir)} | keys)


def write_config(file: Path, keys: dict, more: str = "") -> str:
    """Write a config file with a config of these keys, and other lines; return its path."""
    lines = "from jaxgpt.config import Config", f"config = Config(**{keys!r})", more
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def make_data(folder: Path, text: str = TEXT, name: str = "tale", tokenizer: str = "") -> Path:
    """Prepare `text` as the dataset `name`, also if it exists; return the data folder."""
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare(str(folder / f"{name}.txt"), str(folder), tokenizer, overwrite=True)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The form of every error message: SUBJECT: PROBLEM; expected WHAT; try WHAT.
ERROR_FORM = re.compile(r"\S.*?: \S.*; (expected|try) \S[^\n]*[^\n.]")


def refusal(function, *args, **keys) -> str:
    """Return the message of the `UserError` that a call must raise, after checking its form."""
    with pytest.raises(UserError) as raised:
        function(*args, **keys)
    message = str(raised.value)
    assert ERROR_FORM.fullmatch(message), message
    return message


def exit_code(function, *args) -> int | None:
    """Return the exit code of the `SystemExit` that a call must raise."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    return end.value.code


# ---- single training steps -------------------------------------------------------------------


def make_windows(config: Config, *, steps: int = 1, micro: int = 2, seed: int = 0) -> jax.Array:
    """Return random windows_UMBT: `steps` steps of 8 sequences in `micro` micro-batches."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, config.vocab_size, (steps, 8, config.block_size + 1))
    return jnp.asarray(windows.reshape(steps, micro, 8 // micro, -1), jnp.int32)


def call_step(step, state, windows_UMBT):
    """Take all steps of the windows in one call."""
    return step(state, windows_UMBT, jnp.int32(len(windows_UMBT)))


def take_steps(config: Config, batches: Iterable) -> tuple:
    """Train on these windows_UMBT from a fresh state; return the state and a row per step."""
    mesh = make_mesh(config)
    state, step, rows = init_state(config, mesh), make_train_step(config, mesh), []
    for windows_UMBT in batches:
        state, metrics = call_step(step, state, windows_UMBT)
        metrics = jax.device_get(metrics)
        rows += [{k: v[i] for k, v in metrics.items()} for i in range(len(windows_UMBT))]
    return jax.device_get(state), rows


def value_and_grads(function: Callable, arrays: Sequence, weights) -> tuple:
    """Return the value of `function` and the gradients of its sum weighted by `weights`."""

    def run(arrays, weights):
        value, pull = jax.vjp(function, *arrays)
        return value, *pull(weights.astype(value.dtype))

    return jax.jit(run)([*map(jnp.asarray, arrays)], jnp.asarray(weights))


def assert_all_close(ours: Iterable, theirs: Iterable, atol: float) -> None:
    for i, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=f"array {i}")


# ---- models ----------------------------------------------------------------------------------


def random_params(config: Config, dtype: str = "float32", seed: int = 1) -> dict:
    """Return parameters without zeros, in the layout of a model without `scan_layers`."""
    params = ref.init_params(config, np.random.default_rng(seed), np.dtype(dtype))
    blocks = dict(enumerate(params.pop("blocks")))
    return params | ({"blocks": blocks} if blocks else {})


def build_model(config: Config, params: dict):
    """Return the model with these parameters."""
    return nnx.merge(abstract_model(config)[0], jax.tree.map(jnp.asarray, params))


def loss_and_grads(config: Config, params: dict, tokens_BT, targets_BT) -> tuple:
    """Return the mean cross-entropy of the model and the gradients."""
    graphdef, _, _ = abstract_model(config)

    def loss(params):
        total, count = cross_entropy(nnx.merge(graphdef, params)(tokens_BT), targets_BT)
        return total / count

    return jax.jit(jax.value_and_grad(loss))(params)


def stacked(params: dict) -> dict:
    """Return the parameters in the layout of `scan_layers`."""
    blocks = params["blocks"].values()
    return params | {"blocks": jax.tree.map(lambda *layers: np.stack(layers), *blocks)}


def assert_trees_close(ours: dict, theirs: dict, atol: float) -> None:
    theirs = ref.flatten(theirs)
    for path, value in ref.flatten(ours).items():
        np.testing.assert_allclose(value, theirs.pop(path), rtol=0, atol=atol, err_msg=path)
    assert not theirs


# ---- complete runs ---------------------------------------------------------------------------


def all_rows(config: Config) -> list[dict]:
    if is_url(config.out_dir):
        storage.open_to_read(config.out_dir)
    return read_metrics(storage.local(config.out_dir) / "metrics.jsonl")


def rows_of(config: Config) -> list[dict]:
    """Return the rows of a run's metrics without the time-dependent fields."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in all_rows(config)]


def log_of(config: Config) -> str:
    return Path(config.out_dir, "log.txt").read_text(encoding="utf-8")


def state_of(run: Config | Checkpoints, step: int) -> dict[str, bytes]:
    """Return every array of a checkpoint, parameters and moments, as bytes by path."""
    checkpoints = run_dir.open_checkpoints(run) if isinstance(run, Config) else run
    config = Config.from_dict(checkpoints.meta(step)["config"])
    abstract = abstract_state(config, make_mesh(config))
    items = {"params": abstract.params, "opt_state": abstract.opt_state}
    leaves = jax.tree.leaves_with_path(checkpoints.restore(items, step))
    return {jax.tree_util.keystr(path): np.asarray(array).tobytes() for path, array in leaves}


def params_of(config: Config, checkpoint: str = "latest") -> dict[str, np.ndarray]:
    """Return the parameters of a run's checkpoint, by path."""
    saved = run_dir.load_config(config.out_dir)
    params, _ = run_dir.load_params(saved, checkpoint, local_mesh())
    return ref.flatten(jax.device_get(params))


def stop_at(monkeypatch, *steps: int, number: int = signal.SIGTERM) -> None:
    """Send a signal while these steps are logged, once each."""
    left, log = list(steps), Log.train

    def train(self, row, left_s):
        log(self, row, left_s)
        if left and row["step"] == left[0]:
            signal.raise_signal(number)
            left.pop(0)

    monkeypatch.setattr(Log, "train", train)


def set_val_losses(monkeypatch, by_step: dict[int, float]) -> None:
    """Make the validation loss a function of the step; other losses are 9."""

    def losses(self, params, step):
        return {"train_loss": 9.0, "val_loss": by_step[step]}

    monkeypatch.setattr(Evaluator, "losses", losses)
    monkeypatch.setattr(Evaluator, "full_loss", lambda self, params: 9.0)


def write_run(config: Config, steps: dict[int, dict], tokenizer=None, best: int | None = None):
    """Write a run directory with these parameters at these steps; return the config."""
    folder = Path(config.out_dir)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer.to_json())
    checkpoints = Checkpoints(folder / "checkpoints", keep=5)
    for step, params in steps.items():
        checkpoints.save({"params": params}, {"step": step}, best=step == best)
        checkpoints.wait()
    return config


TRAIN_SCRIPT = (
    "import sys, json; from jaxgpt.config import Config; from jaxgpt.train import train; "
    "from jaxgpt.cli.commands import run; run(lambda argv: train(Config(**json.loads(argv[0]))))"
)


def start(
    config: Config, script: str = TRAIN_SCRIPT, prefix: tuple[str, ...] = (), **options
) -> subprocess.Popen:
    """Start a run in a separate process."""
    command = [*prefix, sys.executable, "-c", script, json.dumps(config.to_dict())]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"cwd": ROOT, "env": env} | pipes | options)
