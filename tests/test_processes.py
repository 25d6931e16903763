"""Several processes over loopback train one run; when one is gone the rest leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxgpt.data.prepare import prepare

ROOT = Path(__file__).parent.parent
CONFIG = """
from jaxgpt.config import Config
config = Config(
    out_dir={out!r}, data_dir={data!r}, dataset="verse", dtype="float64", max_iters=6,
    eval_interval=3, eval_iters=2, log_interval=1, batch_size=4, gradient_accumulation_steps=2,
    block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1, warmup_iters=2, sample_every=1,
)
"""


class Run:
    """The processes of one run, all on this machine, with two devices each."""

    def __init__(self, folder: Path, out: str, processes: int, *flags: str, devices: int = 2):
        config = folder / f"{out}.py"
        config.write_text(CONFIG.format(out=str(folder / out), data=str(folder / "data")))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        join = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        self.folder = folder / out
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), str(config), *flags]
                + ([*join, f"--process_id={i}"] if processes > 1 else []),
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for i in range(processes)
        ]

    def wait(self) -> list[int]:
        """-> the exit codes."""
        self.errors = [process.communicate(timeout=240)[1] for process in self.processes]
        return [process.returncode for process in self.processes]

    def losses(self) -> dict[tuple[int, str], float]:
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return {(r["step"], key): r[key] for r in rows for key in r if key.endswith("loss")}

    def wait_for(self, file: str) -> None:
        while not (self.folder / file).exists():
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.05)


@pytest.fixture
def folder(tmp_path) -> Path:
    text = tmp_path / "verse.txt"
    text.write_text("the quality of mercy is not strained\n" * 40)
    prepare(str(text), str(tmp_path / "data"))
    return tmp_path


def run(folder: Path, out: str, processes: int, *flags: str, devices: int = 2) -> dict:
    one = Run(folder, out, processes, *flags, devices=devices)
    assert one.wait() == [0] * processes, one.errors
    return one.losses()


@pytest.mark.slow
def test_several_processes_train_as_one_does(folder):
    alone = run(folder, "alone", 1, devices=1)
    assert len(alone) == 6 + 3 * 2 + 1
    for name, processes, flags in (
        ("two", 2, []),
        ("split", 2, ["--mesh=fsdp:2,tensor:2"]),
        ("four", 4, ["--mesh=data:2,fsdp:4", "--tokens_on_device=never"]),
    ):
        together = run(folder, name, processes, *flags)
        assert together == pytest.approx(alone, abs=1e-9), name
        files = {p.name for p in (folder / name).iterdir()}
        assert files == {p.name for p in (folder / "alone").iterdir()}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(folder):
    alone = run(folder, "alone", 1, devices=1)
    run(folder, "moved", 2, "--max_iters=3", "--lr_decay_iters=6")
    run(folder, "moved", 4, "--init_from=auto", "--mesh=fsdp:4,tensor:2")
    moved = Run.losses(type("", (), {"folder": folder / "moved"}))
    assert {k: v for k, v in moved.items() if k in alone} == pytest.approx(alone, abs=1e-9)


@pytest.mark.slow
def test_a_mistake_ends_every_process(folder):
    run(folder, "used", 1, "--max_iters=3")
    again = Run(folder, "used", 2)
    assert again.wait() == [2, 2]
    assert all("error: " in error for error in again.errors)


def test_a_signal_to_one_process_stops_all_of_them_at_one_step(folder):
    endless = Run(folder, "endless", 2, "--max_iters=100000", "--log_interval=50")
    endless.wait_for("checkpoints/6/digest.json")
    endless.processes[1].send_signal(signal.SIGTERM)
    assert endless.wait() == [128 + signal.SIGTERM] * 2
    last = max(int(p.name) for p in (folder / "endless/checkpoints").glob("[0-9]*"))
    assert last > 6
    assert (folder / f"endless/checkpoints/{last}/digest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_when_a_process_dies_the_others_leave_within_a_minute(folder, gone):
    endless = Run(folder, "endless", 2, "--max_iters=100000", "--log_interval=50")
    endless.wait_for("checkpoints/6/digest.json")
    endless.processes[gone].kill()
    before = time.monotonic()
    code = endless.processes[1 - gone].wait(timeout=60)
    assert code != 0
    assert time.monotonic() - before < 60
    endless.wait()
    assert "another task died" in endless.errors[1 - gone] or "error: " in endless.errors[1 - gone]
    run(folder, "endless", 1, "--init_from=auto", "--max_iters=6")
