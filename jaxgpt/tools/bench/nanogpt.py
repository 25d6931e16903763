"""Run nanoGPT in a process of its own, convert weights for it, and check what can be compared."""

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import Config, UserError
from jaxgpt.data.tokens import TokenSplit
from jaxgpt.interop.export import to_tensors
from jaxgpt.interop.huggingface import REQUIRED_KEYS
from jaxgpt.runtime import device
from jaxgpt.tools.bench import torch_server

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
OPTIMIZER = ("weight_decay", "learning_rate", "beta1", "beta2", "grad_clip")


class NanoGPTError(Exception):
    """An error in nanoGPT's process, as one line."""


class NanoGPT:
    """A process that runs torch_server.py under a Python that has torch."""

    def __init__(self, path: str, python: str, folder: Path):
        """Start the process; its log and weights go to `folder`.

        Raises `UserError` if there is no nanoGPT at `path`, or if the process cannot start.
        """
        where = f"compare_to={path!r}"
        if not Path(path, "model.py").is_file():
            clone = "git clone https://github.com/karpathy/nanoGPT"
            raise UserError(f"{where}: has no model.py; expected a nanoGPT checkout; try {clone}")
        platform = jax.default_backend()
        if platform not in ("cpu", "gpu"):
            raise UserError(f"{where}: nanoGPT cannot run on a {platform}; expected a CPU or a GPU")
        self._folder = folder
        self._log = open(folder / "nanogpt.log", "w+", encoding="utf-8")  # noqa: SIM115
        torch_device = "cuda" if platform == "gpu" else "cpu"
        command = [python, str(torch_server.__file__), str(Path(path).resolve()), torch_device]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        expected = "expected a Python interpreter that has torch"
        try:
            self._process = subprocess.Popen(command, text=True, **pipes)
        except OSError as error:
            self._log.close()
            raise UserError(f"torch_python={python!r}: {error.strerror}; {expected}") from error
        try:
            self.versions = self._answer()
        except NanoGPTError as error:
            self.close()
            raise UserError(f"torch_python={python!r}: {error}; {expected}") from error

    def load(self, config: Config, tokens: TokenSplit, params: dict, mode: str) -> None:
        """Load the config's model with these parameters; `mode` is eager or compiled.

        Training reads `tokens`. Raises `NanoGPTError`.
        """
        weights = self._folder / "weights.npz"
        arrays: Any = to_nanogpt(config, params)
        np.savez(weights, **arrays)
        data = {"file": str(tokens.files[0]), "dtype": str(tokens.dtype)}
        sizes, optimizer = (
            {key: getattr(config, key) for key in keys} for keys in (SIZES, OPTIMIZER)
        )
        model: dict[str, Any] = {"weights": str(weights), "sizes": sizes, "optimizer": optimizer}
        self.ask("load", **model, data=data, dtype=config.dtype, mode=mode)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command of torch_server.py and return its answer. Raises `NanoGPTError`."""
        if self._process.stdin is None or self._process.poll() is not None:
            raise NanoGPTError("the process has ended")
        with suppress(OSError):  # if the process has ended, `_answer` says why
            self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            raise NanoGPTError(*last or [f"the process ended with code {self._process.wait()}"])
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise NanoGPTError(f"its process printed {line.strip()[:60]!r}") from error
        if "error" in answer:
            raise NanoGPTError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._process.kill()
        self._process.communicate()  # waits, and closes the pipes
        self._log.close()


def check_comparable(config: Config) -> None:
    """Raise `UserError` for a model or an optimizer that nanoGPT does not have."""
    if type(config) is not Config:
        name = type(config).__name__
        raise UserError(f"--compare_to: nanoGPT has no {name}; expected a config of class Config")
    nanogpt_keys = REQUIRED_KEYS | {
        "mlp": "gelu",
        "optimizer": "adamw",
        "attention_dropout": True,
        "freeze": "",
        "remat": "none",
        "cautious_weight_decay": False,
        "skip_loss_spikes": 0.0,
        "document_mask": False,
        "n_kv_head": config.n_kv_head and config.n_head,
        "mlp_dim": config.mlp_dim and 4 * config.n_embd,
        "dtype": "float32" if device.is_cpu() else config.dtype,
    }
    for key, value in nanogpt_keys.items():
        mine = getattr(config, key)
        if mine != value:
            expected = f"expected {key}={value!r} with --compare_to"
            raise UserError(f"{key}={mine!r}: nanoGPT does not have it; {expected}")


def to_nanogpt(config: Config, params: dict) -> dict[str, np.ndarray]:
    """Return the parameters with the names and shapes of nanoGPT's state dict, in float32.

    The names are GPT-2's. Weights of linear maps are [out, in], and `bias=False` has no biases.
    """
    tensors = {}
    for name, array in to_tensors(config, params).items():
        if config.bias or not name.endswith(".bias"):
            tensors[name] = np.ascontiguousarray(array.T if ".h." in name else array)
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
