"""Test profiles: the trace and its table name layers and parts, and the run itself is unchanged."""

import contextlib
import gzip
import json
import re
import signal
from pathlib import Path

import jax
import pytest
from helpers import all_rows, log_of, make_config, make_data, make_windows, stop_at, tiny_run

from jaxgpt.cli.commands import sample
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.runtime.profile import (
    find_kernels,
    label_kernel,
    label_of,
    own_times,
    program_labels,
    start_trace,
    stop_trace,
)
from jaxgpt.train import train
from jaxgpt.train_step import init_state, make_train_step

CLOCKS = {"time", "step_ms", "tokens_per_s", "mfu", "train_s", "total_s"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_run(data_dir, tmp_path):
    return lambda name="run", **keys: tiny_run(tmp_path / name, data_dir, n_layer=2, **keys)


def numbers_of(config) -> list[dict]:
    """Return the rows of metrics.jsonl without the times."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in all_rows(config)]


def read_profile(config) -> tuple[list[dict], str]:
    """Return the events of the trace, and the table."""
    folder = Path(config.out_dir, "profile")
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    return events, (folder / "profile.txt").read_text()


def shares(table: str) -> tuple[list[float], list[float]]:
    """Return the shares of the operations and of the parts, in percent."""
    operations, parts = (re.findall(r"([\d.]+)%", text) for text in table.split("part,"))
    return list(map(float, operations)), list(map(float, parts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{"steps_per_call": 1}, {"steps_per_call": 3, "scan_layers": True}]
)
def test_profile_names_layers_and_parts_and_leaves_the_run_unchanged(make_run, keys):
    keys |= {"max_iters": 12, "eval_interval": 12}
    plain, profiled = make_run("plain", **keys), make_run("profiled", profile=5, **keys)
    assert [train(plain), train(profiled)] == [0, 0]
    assert numbers_of(profiled) == numbers_of(plain)
    events, table = read_profile(profiled)
    steps, ms = re.match(r"(\d+) steps, ([\d.]+) ms per step\n", table).groups()
    assert int(steps) == (5 if keys["steps_per_call"] == 1 else 6), "whole calls"
    operations, parts = shares(table)
    assert len(operations) == 10
    assert operations == sorted(operations, reverse=True)
    assert sum(operations) <= sum(parts) <= 100.5
    names = {event["name"] for event in find_kernels(events)}
    layer = "blocks" if "scan_layers" in keys else "blocks/1"
    for part in (f"{layer}/attn/qkv", f"{layer}/mlp/up", f"{layer}/ln_1", "loss", "lm_head"):
        assert any(name.startswith(f"{part} (") for name in names), part
        assert any(name.startswith(f"{part}, backward (") for name in names), part
    assert any(name.startswith("optimizer (") for name in names)
    assert float(ms) > 0
    assert table in log_of(profiled)
    assert f"open {profiled.out_dir}/profile/trace.json.gz at https://ui" in log_of(profiled)


@pytest.mark.slow
def test_profile_ends_at_an_evaluation_and_at_a_signal(make_run, monkeypatch):
    config = make_run(profile=20, steps_per_call=1)
    train(config)
    assert "profile of steps 3 to 8, because the run pauses before 20: 6 steps" in log_of(config)
    stop_at(monkeypatch, 5)
    stopped = make_run("stopped", profile=20, steps_per_call=1)
    assert train(stopped) == 128 + signal.SIGTERM
    assert re.search(r"profile of steps 3 to [567], because", log_of(stopped))
    assert read_profile(stopped)[0]
    assert Path(stopped.out_dir, "checkpoints").is_dir()


@pytest.mark.slow
def test_run_that_ends_before_the_profile_says_so(make_run):
    config = make_run(max_iters=2, profile=20)
    train(config)
    assert "profile=20: the run ended in its first 2 calls" in log_of(config)
    assert not Path(config.out_dir, "profile").exists()


@pytest.mark.slow
def test_sampling_is_profiled_after_the_same_samples(make_run, capsys):
    config = make_run(max_iters=2, eval_iters=1)
    train(config)
    flags = [f"--out_dir={config.out_dir}", "--num_samples=2", "--max_new_tokens=20"]
    capsys.readouterr()
    sample(flags)
    plain = capsys.readouterr().out
    own = Path(config.out_dir, "profile", "sample", "notes.txt")
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    sample([*flags, "--profile=9"])
    printed = capsys.readouterr()
    assert printed.out == plain
    assert own.read_text() == "mine", "a profile deletes only profiles"
    folder = own.parent
    table = (folder / "profile.txt").read_text()
    assert re.match(r"2 calls, [\d.]+ ms per call\n", table), "20 tokens are two calls"
    assert "lm_head" in table
    assert f"profile of 2 decode calls of 16 tokens: {table}" in printed.err
    assert json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]


def without_names(program: str) -> str:
    """Remove metadata from a program, and number its instructions in their order."""
    text = re.sub(r', metadata=\{(?:[^{}"]|"[^"]*"|\{[^}]*\})*\}', "", program)
    text = re.sub(r"\n(File|Function|Stack)\w+\n(?:.+\n)*", "\n", text)
    numbers: dict[str, str] = {}
    return re.sub(r"%[\w.-]+", lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), text)


@pytest.mark.slow
def test_names_do_not_change_the_compiled_program(monkeypatch):
    config = make_config(n_layer=2, dropout=0.1)
    mesh = make_mesh(config)

    def compiled() -> str:
        jax.clear_caches()
        state, windows = init_state(config, mesh), make_windows(config)
        return make_train_step(config, mesh).lower(state, windows, 1).compile().as_text()

    named = compiled()
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    unnamed = compiled()
    assert "blocks/1" in named
    assert "blocks/1)" not in unnamed
    assert without_names(named) == without_names(unnamed)


@pytest.mark.parametrize(
    ("op_name", "label"),
    [
        ("jit(train_step)/jvp(blocks/3)/attn/qkv/dot_general", "blocks/3/attn/qkv"),
        (
            "jit(train_step)/while/body/closed_call/transpose(jvp(blocks/3))/attn/jit(_where)/mul",
            "blocks/3/attn, backward",
        ),
        ("jit(f)/transpose(jvp())/while/body/checkpoint/rematted_computation/blocks/mlp/up/dot",
         "blocks/mlp/up, backward"),
        ("jit(train_step)/blocks/0/attn/BTNH->BNHT/transpose;jvp()/reshape", "blocks/0/attn"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/square", "square"),
        ("jit(train_step)/while", ""),
    ],
)  # fmt: skip
def test_label_is_layer_part_and_direction(op_name, label):
    assert label_of(op_name) == label


def kernel(start: float, us: float, name: str = "k", pid: int = 1, tid: int = 1, **args) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": us, "name": name, "args": args}


def test_kernels_that_run_at_once_share_the_time():
    kernels = [
        kernel(0, 10, "while"),
        kernel(2, 3),
        kernel(4, 4, tid=2),
        kernel(5, 0),
        kernel(20, 1, pid=2),
    ]
    # thread 1: loop 0-2, kernel 2-5, loop 5-10; thread 2: 4-8; a gap; another device: 20-21
    assert own_times(kernels) == [2 + 3 / 2 + 2, 2 + 1 / 2, 1 / 2 + 3 / 2, 0, 1]


def test_kernels_of_gpus_and_tpus_are_named_by_the_program():
    """A CUDA graph's kernels and a TPU's operations name no program."""
    line = (
        '  ROOT %fusion.7 = f32[2]{0} fusion(%a), metadata={op_name="jit(f)/blocks/1/mlp/up/dot"}\n'
    )
    labels = program_labels(f"HloModule jit_f, is_scheduled=true\n\n{line}")
    names = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:TPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "XLA Modules"}},
    ]
    on_tpu, module = kernel(0, 1, "fusion.7"), kernel(0, 9, "jit_f", tid=2)
    assert find_kernels([*names, on_tpu, module]) == [on_tpu]
    of = lambda event: label_kernel(event, labels)[0]
    assert of(on_tpu) == "blocks/1/mlp/up"
    assert of(kernel(0, 1, "fusion_7")) == "blocks/1/mlp/up"
    assert of(kernel(0, 1, "nvjet", hlo_op="fusion.7", hlo_module="jit_f")) == "blocks/1/mlp/up"
    assert of(kernel(0, 1, "loop", hlo_op="fusion.7", hlo_module="jit_other")) == "other"
    assert of(kernel(0, 1, "ampere_gemm")) == "ampere_gemm"
    other = program_labels("HloModule jit_g\n\n" + line.replace("up/dot", "down/dot"))
    both = {"jit_f": {}} | other | labels
    assert label_kernel(on_tpu, other | {"jit_h": {}})[0] == "blocks/1/mlp/down"
    assert label_kernel(on_tpu, both)[0] == "fusion"  # one of two programs, not known which


def test_trace_can_start_after_a_run_that_failed_inside_one(tmp_path):
    start_trace(tmp_path / "failed")
    start_trace(tmp_path / "next")
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))))
    assert find_kernels(stop_trace(tmp_path / "next"))
