"""nanoGPT beside jaxgpt: its process, its weights, and which configs can be compared."""

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
OPTIMIZER = ("weight_decay", "learning_rate", "beta1", "beta2", "grad_clip")  # in this order


class NanoGPTError(Exception):
    """What went wrong in nanoGPT's process, as one line."""


class NanoGPT:
    """nanoGPT under another Python; see torch_server.py for the commands that it takes."""

    def __init__(self, path: str, python: str, folder: Path):
        """Start the process. Raises `UserError` if it cannot start."""
        if not Path(path, "model.py").is_file():
            raise UserError(f"--compare_to {path}: there is no model.py; name a nanoGPT checkout")
        platform = jax.default_backend()
        if platform not in ("cpu", "gpu"):
            raise UserError(f"--compare_to {path}: nanoGPT cannot run on a {platform}")
        self._folder = folder
        self._log = open(folder / "nanogpt.log", "w+", encoding="utf-8")  # noqa: SIM115
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        torch_device = "cuda" if platform == "gpu" else "cpu"
        command = [python, str(torch_server.__file__), str(Path(path).resolve()), torch_device]
        try:
            self._process = subprocess.Popen(command, text=True, **pipes)
        except OSError as error:
            self._log.close()
            raise UserError(f"--torch_python {python}: {error.strerror}") from error
        try:
            self.versions = self._answer()
        except NanoGPTError as error:
            self.close()
            raise UserError(f"--torch_python {python}: {error}") from error

    def load(self, c: Config, tokens: TokenSplit, params: dict, mode: str) -> None:
        """Send the config's model with these parameters, and where the data is."""
        file = self._folder / "weights.npz"
        arrays: Any = to_nanogpt(c, params)
        np.savez(file, **arrays)
        data = {"file": str(tokens.files[0]), "dtype": str(tokens.dtype)}
        sizes, optimizer = ({key: getattr(c, key) for key in keys} for keys in (SIZES, OPTIMIZER))
        model: dict[str, Any] = {"weights": str(file), "sizes": sizes, "optimizer": optimizer}
        self.ask("load", **model, data=data, dtype=c.dtype, mode=mode)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises `NanoGPTError`."""
        if self._process.stdin is None or self._process.poll() is not None:
            raise NanoGPTError("the process has ended")
        with suppress(OSError):  # the process has ended, and its answer says why
            self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            raise NanoGPTError(*last or [f"the process ended with code {self._process.wait()}"])
        answer = json.loads(line)
        if "error" in answer:
            raise NanoGPTError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._process.kill()
        self._process.communicate()  # waits, and closes the pipes
        self._log.close()


def check_comparable(c: Config) -> None:
    """Raise `UserError` for a model that nanoGPT does not have."""
    if type(c) is not Config:
        raise UserError(f"--compare_to: nanoGPT has no {type(c).__name__}; expected a plain Config")
    has = REQUIRED_KEYS | {
        "mlp": "gelu",
        "optimizer": "adamw",
        "attention_dropout": True,
        "document_mask": False,
        "n_kv_head": c.n_kv_head and c.n_head,
        "mlp_dim": c.mlp_dim and 4 * c.n_embd,
        "dtype": "float32" if device.is_cpu() else c.dtype,
    }
    for key, value in has.items():
        mine = getattr(c, key)
        if mine != value:
            raise UserError(f"{key}={mine!r}: with --compare_to, must be nanoGPT's {value!r}")


def to_nanogpt(config: Config, params: dict) -> dict[str, np.ndarray]:
    """Return the parameters under the names and in the shapes of nanoGPT's state dict, float32.

    They are GPT-2's, but its linear maps are [out, in], and a model without biases has none.
    """
    tensors = {
        name: np.ascontiguousarray(array.T if ".h." in name else array)
        for name, array in to_tensors(config, params).items()
        if config.bias or not name.endswith(".bias")
    }
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
