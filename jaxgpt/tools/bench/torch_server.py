"""Run nanoGPT for `jaxgpt bench --compare_to`, under a Python that has torch but not jaxgpt.

    python torch_server.py PATH_TO_NANOGPT cpu|cuda

Each line of stdin is a command in JSON, and each line of stdout is its answer. nanoGPT's model.py
is imported unchanged. The code around the model repeats nanoGPT's train.py and sample.py.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from itertools import chain
from typing import Any


class NanoGPT:
    """nanoGPT's model, optimizer and data; every public method is a command."""

    def start(self, path: str, device: str) -> dict[str, Any]:
        """Import torch and nanoGPT; return torch's version, the device and the threads."""
        self.np, self.torch = (importlib.import_module(name) for name in ("numpy", "torch"))
        spec: Any = importlib.util.spec_from_file_location("model", os.path.join(path, "model.py"))
        self.gpt = sys.modules["model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.gpt)
        t, self.device, is_cuda = self.torch, device, device == "cuda"
        t.backends.cuda.matmul.allow_tf32 = t.backends.cudnn.allow_tf32 = True
        if is_cuda and not t.cuda.is_available():
            raise RuntimeError("this torch finds no CUDA device")
        name = t.cuda.get_device_name() if is_cuda else "cpu"
        return {"torch": t.__version__, "device": name, "threads": t.get_num_threads()}

    def load(self, weights: str, sizes: dict, optimizer: dict, data: dict, dtype: str, mode: str):
        """Load weights (.npz) into a new model with an optimizer; `mode` is eager or compiled."""
        self.free()
        t = self.torch
        self.ctx = contextlib.nullcontext()
        if dtype != "float32":
            self.ctx = t.amp.autocast(device_type=self.device, dtype=getattr(t, dtype))
        self.block_size = sizes["block_size"]
        self.tokens = self.np.memmap(data["file"], data["dtype"], "r")
        model = self.gpt.GPT(self.gpt.GPTConfig(**sizes))
        with self.np.load(weights) as arrays:
            model.load_state_dict({name: t.from_numpy(arrays[name]) for name in arrays.files})
        self.model = model.to(self.device).train()
        self.grad_clip = optimizer["grad_clip"]
        betas = optimizer["beta1"], optimizer["beta2"]
        self.optimizer = self.model.configure_optimizers(
            optimizer["weight_decay"], optimizer["learning_rate"], betas, self.device
        )
        self.forward = t.compile(self.model) if mode == "compiled" else self.model

    def free(self) -> None:
        """Delete the model and free its device memory."""
        self.model: Any = None
        self.forward: Any = None
        self.optimizer: Any = None
        gc.collect()
        if hasattr(self.torch, "_dynamo"):
            self.torch._dynamo.reset()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def train(self, starts: list, lrs: list[float]) -> dict[str, Any]:
        """Train on windows that begin at `starts` [steps, M, B], with a learning rate per step."""
        t, losses = self.torch, []
        batches = (self._batch(micro) for step in starts for micro in step)
        began = self._clock()
        x, y = next(batches)
        for step, lr in zip(starts, lrs, strict=True):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            total = 0
            for _ in step:
                with self.ctx:
                    _, loss = self.forward(x, y)
                    loss = loss / len(step)
                x, y = next(batches, (x, y))  # before the backward pass, as in train.py
                loss.backward()
                total = total + loss.detach()
            if self.grad_clip:
                t.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        seconds = self._clock() - began
        peak = t.cuda.max_memory_allocated() if self.device == "cuda" else None
        return {"seconds": seconds, "losses": [loss.item() for loss in losses], "peak_bytes": peak}

    def sample(self, prompt: list[int], tokens: int, temperature: float, top_k: int):
        """Time nanoGPT's `generate` for this number of new tokens."""
        t = self.torch
        self.model.eval()
        ids = t.tensor([prompt], dtype=t.long, device=self.device)
        began = self._clock()
        with t.no_grad(), self.ctx:
            self.model.generate(ids, tokens, temperature=temperature, top_k=top_k)
        return {"seconds": self._clock() - began}

    def _clock(self) -> float:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def _batch(self, starts: list[int]) -> tuple:
        """Make a batch as train.py's get_batch does, but from given windows."""
        t, size = self.torch, self.block_size
        rows = [self.tokens[i : i + size + 1].astype(self.np.int64) for i in starts]
        x = t.stack([t.from_numpy(row[:-1]) for row in rows])
        y = t.stack([t.from_numpy(row[1:]) for row in rows])
        if self.device == "cuda":
            return tuple(a.pin_memory().to(self.device, non_blocking=True) for a in (x, y))
        return x, y


def exit_with_parent() -> None:
    """End this process when its parent has ended, which may be in the middle of a command."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Answer commands from stdin until it closes; an error of a command is its answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nanoGPT prints to stdout, which is for answers
    # Without this folder on the path, torch cannot import our modules instead of its own.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here]

    threading.Thread(target=exit_with_parent, daemon=True).start()
    server = NanoGPT()
    start = {"do": "start", "path": sys.argv[1], "device": sys.argv[2]}
    for command in chain([start], map(json.loads, sys.stdin)):
        try:
            reply = getattr(server, command.pop("do"))(**command) or {}
        except Exception as error:  # torch, a compiler and a driver raise many types
            reply = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
