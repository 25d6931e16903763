"""Start all processes of one run on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT

CONFIG = """
from jaxgpt.config import Config
config = Config(
    out_dir={out!r}, data_dir={data!r}, dataset="verse", dtype="float64", max_iters=6,
    eval_interval=3, eval_iters=2, log_interval=1, batch_size=4, gradient_accumulation_steps=2,
    block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1, warmup_iters=2, sample_every=1,
)
"""


TRAIN = ("train.py",)
# Processes that share a core may send no heartbeat for half a minute while they compile.
TRAIN_PATIENTLY = (
    "-c",
    "import runpy; from jaxgpt.runtime import distributed; distributed.HEARTBEAT_S = 600; "
    "runpy.run_path('train.py', run_name='__main__')",
)


class Run:
    """The processes of one run, all on this machine, with two devices each by default.

    `own_flags` are those of single processes.
    """

    def __init__(
        self,
        folder: Path,
        out: str,
        processes: int,
        *flags: str,
        devices: int = 2,
        script: tuple[str, ...] = TRAIN,
        own_flags: dict[int, list[str]] | None = None,
    ):
        config = folder / f"{out}.py"
        config.write_text(CONFIG.format(out=str(folder / out), data=str(folder / "data")))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        others = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.folder, self.processes = folder / out, []
        for i in range(processes):
            command = [sys.executable, *script, str(config), *flags, *(own_flags or {}).get(i, [])]
            command += [*others, f"--process_id={i}"] if processes > 1 else []
            self.processes.append(subprocess.Popen(command, env=env, cwd=ROOT, **pipes))

    def wait(self, timeout_s: float = 240) -> list[int]:
        """Wait for all processes; return the exit codes."""
        self.errors = [process.communicate(timeout=timeout_s)[1] for process in self.processes]
        return [process.returncode for process in self.processes]

    def losses(self) -> dict[tuple[int, str], float]:
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return {(r["step"], key): r[key] for r in rows for key in r if key.endswith("loss")}

    def wait_for(self, file: str) -> None:
        deadline = time.monotonic() + 240
        while not (self.folder / file).exists():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.05)
