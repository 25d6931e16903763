"""nanoGPT beside jaxgpt: its process, its weights, and taking turns with it."""

import json
import subprocess
import time
from collections.abc import Callable
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
from jaxgpt.tools.bench import torch_server as bench_torch

REST_S = 0.3  # before a turn, for the other side's threads to fall asleep


class NanoGPTError(Exception):
    """What went wrong at nanoGPT's side, as one line."""


class NanoGPT:
    """nanoGPT under another Python: see bench_torch.py. Raises `UserError` if it cannot start."""

    def __init__(self, path: str, python: str, folder: Path):
        if not Path(path, "model.py").is_file():
            raise UserError(f"--vs {path}: there is no model.py; name a checkout of nanoGPT")
        platform = jax.default_backend()
        if platform not in ("cpu", "gpu"):
            raise UserError(f"--vs {path}: nanoGPT cannot run on a {platform}")
        server = str(Path(bench_torch.__file__))
        self._folder = folder
        self._log = open(folder / "nanogpt.log", "w+", encoding="utf-8")  # noqa: SIM115
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        wanted = "cuda" if platform == "gpu" else "cpu"
        command = [python, server, str(Path(path).resolve()), wanted]
        try:
            self._process = subprocess.Popen(command, text=True, **pipes)
        except OSError as error:
            self._log.close()
            raise UserError(f"--torch_python {python}: {error.strerror}") from error
        try:
            self._answer()
            self.versions = self.ask("hello")
        except NanoGPTError as error:
            self.close()
            raise UserError(f"--torch_python {python}: {error}") from error

    def load(self, c: Config, tokens: TokenSplit, params: dict, mode: str, **sizes: Any) -> None:
        """Gives it the config's model with these parameters, and the data; `sizes` override."""
        file = self._folder / "weights.npz"
        arrays: Any = to_nanogpt(c, params)
        np.savez(file, **arrays)
        keys = "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"
        sizes = {key: getattr(c, key) for key in keys} | sizes
        keys = "weight_decay", "learning_rate", "beta1", "beta2", "grad_clip"
        self.ask(
            "load",
            weights=str(file),
            sizes=sizes,
            optimizer={key: getattr(c, key) for key in keys},
            data={"file": str(tokens.files[0]), "dtype": str(tokens.dtype)},
            dtype=c.dtype,
            mode=mode,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer. Raises `NanoGPTError`."""
        if self._process.stdin is None or self._process.poll() is not None:
            raise NanoGPTError("the process has ended")
        try:
            self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, and the answer says why
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
        """Ends the process; may be called again."""
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(OSError):
                if stream:
                    stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def check_comparable(c: Config) -> None:
    """Raises `UserError` for a model that nanoGPT does not have."""
    has = REQUIRED_KEYS | {
        "mlp": "gelu",
        "optimizer": "adamw",
        "qkv_bias": True,
        "embed_dropout": True,
        "attention_dropout": True,
        "decay_all": False,
        "document_mask": False,
        "n_kv_head": c.n_kv_head and c.n_head,
        "mlp_dim": c.mlp_dim and 4 * c.n_embd,
    }
    has["dtype"] = "float32" if device.is_cpu() else c.dtype
    for key, value in has.items():
        if getattr(c, key) != value:
            raise UserError(f"{key}={getattr(c, key)!r}: with --vs, must be nanoGPT's {value!r}")


def to_nanogpt(config: Config, params: dict) -> dict[str, np.ndarray]:
    """Parameters under the names and in the shapes of nanoGPT's state dict, float32.

    They are GPT-2's, but its linear maps are [out, in], and a model without biases has none.
    """
    tensors = {
        name: np.ascontiguousarray(array.T if ".h." in name else array)
        for name, array in to_tensors(config, params).items()
        if config.bias or not name.endswith(".bias")
    }
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def interleaved(
    ours: list[Callable[[], float]], theirs: Callable[[], float], pairs: int
) -> list[dict[str, Any]]:
    """Seconds of each of ours and of theirs, A B A B, all idle while one works -> one dict for
    each of ours; its ratio is theirs / ours.
    """
    turns = []
    for _ in range(pairs):
        turns.append([])
        for side in (*ours, theirs):
            time.sleep(REST_S)
            turns[-1].append(side())
    return [_compare([(row[i], row[-1]) for row in turns]) for i in range(len(ours))]


def _compare(seconds: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [theirs / ours for ours, theirs in seconds]
    rows = [
        {"jaxgpt_s": ours, "nanogpt_s": theirs, "ratio": ratio}
        for (ours, theirs), ratio in zip(seconds, ratios, strict=True)
    ]
    return {"pairs": rows, "ratio": float(np.median(ratios)), "range": [min(ratios), max(ratios)]}


def format_ratios(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name}: {result['error']}"
    each = " ".join(f"{row['ratio']:.2f}" for row in result["pairs"])
    (low, high), median = result["range"], result["ratio"]
    return f"{name} / jaxgpt, pair by pair: {each}; median {median:.2f} ({low:.2f}-{high:.2f})"
