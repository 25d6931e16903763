"""Test that several processes train one run, and that all exit if one process dies."""

import os
import signal
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest
from helpers import make_data
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
from processes import Run

from jaxgpt.config import UserError
from jaxgpt.runtime.distributed import StopSignal, abort_all_on_error, init_distributed

# ---- joining processes -----------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "tpu-0.pod,tpu-1.pod", "TPU_WORKER_ID": "1"}


@pytest.fixture
def joined(monkeypatch) -> list[tuple]:
    """Record the coordinator, process count and process id that JAX is given or detects."""
    calls = []

    def initialize(coordinator=None, count=None, number=None, **_):
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, count, number, None, None, 1
        )
        if found[0] is None:
            raise ValueError("coordinator_address should be defined.")
        calls.append(found[:3])

    def get_metadata(key):
        raise OSError("the metadata server was asked")

    others = "TPU_SKIP_MDS_QUERY", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST"
    for name in {*SLURM, *GKE, *others, "JOB_COMPLETION_INDEX"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)
    monkeypatch.setattr(
        cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *args: None
    )
    return calls


@pytest.fixture
def on_tpu_vm(monkeypatch):
    """Simulate a host on which JAX has found TPU chips."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", before)


@pytest.fixture
def set_env(monkeypatch):
    return lambda env: [monkeypatch.setenv(name, value) for name, value in env.items()]


NO_PROCESSES = ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"})


@pytest.mark.parametrize("env", NO_PROCESSES, ids=["no launcher", "a Slurm step of one process"])
def test_single_process_does_not_initialize_distributed(joined, set_env, env):
    set_env(env)
    init_distributed()
    assert joined == []


def test_slurm_processes_find_the_coordinator(joined, set_env):
    set_env(SLURM)
    init_distributed()
    assert joined == [("node3:61447", 16, 9)]


@pytest.mark.parametrize("endpoints", ["a:0:10.0.0.5,b:1:10.0.0.6", "10.0.0.5,10.0.0.6"])
def test_tpu_pod_hosts_find_the_coordinator(joined, on_tpu_vm, monkeypatch, endpoints):
    """The metadata server of Cloud TPU VMs lists the hosts in two forms."""
    said = {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": ""}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (said[key], 200))
    init_distributed()
    assert joined == [("10.0.0.5:8482", 2, 1)]


def test_gke_tpu_hosts_find_the_coordinator(joined, on_tpu_vm, monkeypatch, set_env):
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    set_env(GKE)
    init_distributed()
    assert joined == [("tpu-0.pod:8482", 2, 1)]


@pytest.mark.parametrize(
    ("env", "device"), [({"TPU_SKIP_MDS_QUERY": "1"}, "auto"), ({}, "cpu")], ids=["no pod", "CPU"]
)
def test_tpu_host_without_pod_or_with_cpu_device_runs_alone(
    joined, on_tpu_vm, set_env, env, device
):
    set_env(env)
    init_distributed(device=device)
    assert joined == []


def test_unreachable_metadata_server_error_suggests_coordinator_flag(joined, on_tpu_vm):
    with pytest.raises(UserError, match=r"the metadata server was asked.*--coordinator"):
        init_distributed()


@pytest.fixture
def started() -> int:
    """Start JAX, and return the number of its devices."""
    return len(jax.devices())


def test_tpu_host_that_has_started_jax_keeps_its_processes(started, on_tpu_vm, set_env):
    """A notebook may have used JAX before it trains."""
    init_distributed()
    set_env(SLURM)
    with pytest.raises(UserError, match="cannot find the other processes"):
        init_distributed()


def test_unknown_launcher_error_suggests_coordinator_flag(joined, set_env):
    set_env({"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(UserError, match=r"cannot find .*--coordinator"):
        init_distributed()


@pytest.mark.parametrize(("count", "number"), [(0, -1), (2, -1), (2, 2)])
def test_process_id_out_of_range_is_rejected(joined, count, number):
    with pytest.raises(UserError, match=f"process_id={number}: no such process of {count}; expect"):
        init_distributed("10.0.0.5:8476", count, number)
    init_distributed("10.0.0.5:8476", 2, 1)
    assert joined == [("10.0.0.5:8476", 2, 1)]


# ---- runs of several processes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder of the dataset and all runs."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "data").mkdir()
    make_data(folder / "data", "the quality of mercy is not strained\n" * 40, "verse")
    return folder


def run(folder: Path, out: str, count: int, *flags: str, devices: int = 2) -> dict:
    one = Run(folder, out, count, *flags, devices=devices)
    assert one.wait() == [0] * count, one.errors
    return one.losses()


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """Return the losses of a run on one device."""
    losses = run(folder, "alone", 1, devices=1)
    assert len(losses) == 6 + 3 * 2 + 1
    return losses


@pytest.mark.slow
def test_four_processes_train_to_the_same_losses_as_one_process(folder, alone):
    four = run(folder, "four", 4, "--mesh=data:2,fsdp:4", "--data_on_device=never")
    assert four == pytest.approx(alone, abs=1e-9)
    files = {p.name for p in (folder / "four").iterdir()}
    assert files == {p.name for p in (folder / "alone").iterdir()}


@pytest.mark.slow
def test_run_resumes_with_another_process_count_and_mesh(folder, alone):
    run(folder, "moved", 2, "--max_iters=3", "--lr_decay_iters=6")
    moved = run(folder, "moved", 4, "--init_from=auto", "--mesh=fsdp:4,tensor:2")
    assert {k: v for k, v in moved.items() if k in alone} == pytest.approx(alone, abs=1e-9)


@pytest.mark.slow
def test_processes_with_aligned_documents_stop_together_at_the_target(folder):
    """A line is a document. The target is the loss at step 3, from a run of one process."""
    aligned = "--align_documents=True", "--eot_id=0", "--block_size=32", "--learning_rate=0.01"
    one = run(folder, "aligned", 1, *aligned, devices=1)
    target = one[3, "val_loss"] + 1e-6
    assert target < one[0, "val_loss"]
    two = run(folder, "target", 2, *aligned, f"--target_val_loss={target}")
    assert max(step for step, _ in two) == 3
    assert two.pop((3, "target_val_loss")) == target
    del two[3, "full_val_loss"]
    assert two == pytest.approx({key: one[key] for key in two}, abs=1e-9)
    assert (folder / "target/checkpoints/3/digest.json").exists()


def test_user_error_in_process_0_ends_every_process(folder):
    """The processes have joined, and a collective reports the failure of process 0."""
    nothing = Run(folder, "nothing", 2, "--init_from=resume")
    assert nothing.wait() == [2, 2]
    assert "no checkpoint in" in nothing.errors[0]
    assert "process 0: failed; expected no error; try its log" in nothing.errors[1]


def test_processes_with_different_keys_are_refused(folder):
    """Otherwise they would hang, or train on different batches."""
    mixed = Run(folder, "mixed", 2, own_flags={1: ["--seed=7"]})
    assert mixed.wait() == [2, 2]
    for error, seed in zip(mixed.errors, (1337, 7), strict=True):
        assert f"seed={seed}: the processes of this run have different values" in error
    assert not (folder / "mixed/config.json").exists()


@pytest.mark.parametrize("broken", [BrokenPipeError, OSError(5, "Input/output error")])
def test_signal_is_recorded_if_stderr_is_closed(monkeypatch, broken):
    """As in `python train.py 2>&1 | tee log`, where Ctrl-C ends `tee` too."""
    monkeypatch.setattr(os, "write", Mock(side_effect=broken))
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == 128 + signal.SIGINT


GONE = "UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [10.0.0.5]:15769"


@pytest.mark.parametrize("ours", [False, True])
def test_lost_process_is_one_line_and_other_errors_keep_the_traceback(monkeypatch, capsys, ours):
    class Ended(BaseException):
        """Raised in place of the end of the process."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended, abort_all_on_error():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory" if ours else GONE)
    assert ended.value.args == (1,)
    *before, last = capsys.readouterr().err.splitlines()
    assert bool(before) == ours
    said = "RESOURCE_EXHAUSTED: out" if ours else f"another process of this run has ended ({GONE})"
    assert last.startswith(f"error: process 0: {said}")
    assert last.endswith("; try --init_from=auto to continue from the last checkpoint")


@pytest.mark.slow
def test_signal_to_one_process_stops_all_processes_with_a_checkpoint(folder):
    endless = endless_run(folder, "stopped")
    endless.processes[1].send_signal(signal.SIGTERM)
    assert endless.wait() == [128 + signal.SIGTERM] * 2
    last = max(int(p.name) for p in (folder / "stopped/checkpoints").glob("[0-9]*"))
    assert last > 3
    assert (folder / f"stopped/checkpoints/{last}/digest.json").exists()


def endless_run(folder: Path, out: str) -> Run:
    """Start two processes that train without end; return after the first checkpoint."""
    endless = Run(folder, out, 2, "--max_iters=100000", "--log_interval=50", "--sample_every=0")
    endless.wait_for("checkpoints/3/digest.json")
    return endless


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_death_of_one_process_ends_the_other_within_a_minute(folder, gone):
    out = f"without_{gone}"
    endless = endless_run(folder, out)
    endless.processes[gone].kill()
    assert endless.processes[1 - gone].wait(timeout=60) != 0
    endless.wait()
    error = endless.errors[1 - gone]
    assert "another task died" in error or "another process of this run has ended" in error
    assert "Traceback" not in error
    saved = max(int(p.parent.name) for p in (folder / out).glob("checkpoints/[0-9]*/digest.json"))
    if gone:  # one process goes on from there
        losses = run(folder, out, 1, "--init_from=auto", f"--max_iters={saved + 1}")
        assert (saved + 1, "loss") in losses
