"""Test the suite of rows for a GPU: choice, results, crashes, traces, and every row at toy size."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, make_data, refusal

from jaxgpt.config import UserError
from jaxgpt.kernels import ANY, TABLE
from jaxgpt.kernels.platform import current_platform
from jaxgpt.tools.bench import report, sampling, suite, suite_rows, training
from jaxgpt.tools.bench.nanogpt import NanoGPTError
from jaxgpt.tools.bench.options import BenchArgs
from jaxgpt.tools.bench.suite_rows import LEVERS, ROWS, SHARED, TOY, Row, Suite
from jaxgpt.tools.bench.trace import read_trace

NOW = {"device": "card", "commit": "c" * 40, "versions": {"jax": "1"}}


def make_suite(folder: Path, sizes=TOY) -> Suite:
    (folder / "temporary").mkdir(exist_ok=True)
    return Suite(sizes, folder / "temporary", folder / "rows.json")


def rows_of(suite_here: Suite) -> dict:
    return suite.read_results(suite_here.file)["rows"]


def make_row(name: str, measure) -> Row:
    return Row(name, f"what {name} is", lambda suite: measure())


@pytest.fixture
def machine(monkeypatch) -> dict:
    """Return the facts of a machine that the suite sees, which a test may change."""
    facts = NOW | {"hardware": {"device": "card", "devices": 1}}
    monkeypatch.setattr(suite, "describe_machine", lambda: facts)
    return facts


# --- Choice of rows -----------------------------------------------------------------------------


def test_rows_have_different_names_and_one_lever_for_every_gpu_kernel():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    levers = {f"lever_{operation}" for operation, platform in TABLE if platform == "gpu"}
    assert levers == {name for name in names if name.startswith("lever_")}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("train_124m", ["train_124m"]),  # an exact name, although others begin with it
        ("muon,decode", ["muon", "decode_1", "decode_8", "decode_64"]),
        ("nanogpt", ["nanogpt_124m", "nanogpt_124m_batch12"]),
    ],
)
def test_rows_are_chosen_by_name_or_beginning(names, found):
    assert [row.name for row in suite.select(names, with_nanogpt=True)] == found


def test_rows_with_nanogpt_need_its_checkout():
    assert [row for row in ROWS if row.env is SHARED] == suite.select("nanogpt", True)
    assert not [row for row in suite.select("", False) if row.env is SHARED]
    message = refusal(suite.select, "nanogpt", False)
    assert message.startswith("rows='nanogpt': unknown row; expected some of train_124m, ")
    assert message.endswith("try --compare_to for rows with nanoGPT")


def test_suite_with_a_config_of_another_benchmark_is_rejected():
    message = refusal(suite.run_suite, BenchArgs(suite="gpu", preset="baby"))
    assert message == "suite='gpu': has its own configs; try without --preset and --config"


# --- Results ------------------------------------------------------------------------------------


def test_rows_are_written_at_once_and_not_measured_again(tmp_path, machine, capsys):
    calls, here = [], make_suite(tmp_path)

    def measure():
        calls.append(rows_of(here)["a"]["error"])
        return {"ms": 1234.5, "% MFU": 43.21}, {"samples": [1, 2]}

    rows = [make_row("a", measure)]
    suite.measure_rows(here, rows, time.time() + 9)
    suite.measure_rows(here, rows, time.time() + 9)
    assert calls == [suite.DID_NOT_END]  # as long as the row is measured
    assert capsys.readouterr().out == "a: 1,234 ms, 43.21 % MFU\na: measured before\n"
    found = rows_of(here)["a"]
    assert found["values"] == {"ms": 1234.5, "% MFU": 43.21}
    assert (found["details"], found["commit"]) == ({"samples": [1, 2]}, "c" * 40)
    machine["commit"] = "d" * 40
    suite.measure_rows(here, rows, time.time() + 9)
    assert len(calls) == 2
    for changed in {"modes": ["eager"]}, {"xla_flags": "--mine=1"}:
        suite.measure_rows(replace(here, **changed), rows, time.time() + 9)
    assert len(calls) == 4


def test_row_with_a_failed_part_keeps_its_values_and_is_measured_again(tmp_path, machine, capsys):
    here = make_suite(tmp_path)
    for _ in range(2):
        part = make_row("a", lambda: ({"ms": 2.0}, {"error": "nanoGPT compiled: out of memory"}))
        suite.measure_rows(here, [part], time.time() + 9)
    line = "a: 2 ms, failed: nanoGPT compiled: out of memory\n"
    assert capsys.readouterr().out == 2 * line
    assert suite.format_table(rows_of(here)).splitlines()[3:] == [
        "| `a` | what a is | 2 | ms | card, toy size | ccccccc |",
        "| `a` | what a is | failed | nanoGPT compiled: out of memory | card, toy size | ccccccc |",
    ]


def test_failed_row_has_its_error_in_one_line_and_is_measured_again(tmp_path, machine):
    def fail():
        raise ValueError("first line\nsecond line")

    def refuse():
        raise UserError("attention='cudnn': needs an NVIDIA GPU; try --attention=auto")

    here, value = make_suite(tmp_path), lambda: ({"ms": 1.0}, {})
    rows = [make_row("a", fail), make_row("b", refuse), make_row("c", value)]
    suite.measure_rows(here, rows, time.time() + 9)
    found = rows_of(here)
    assert found["a"]["error"] == "ValueError: first line"
    assert found["b"]["error"].startswith("attention='cudnn': needs")
    assert found["c"]["values"] == {"ms": 1}
    suite.measure_rows(here, [make_row("a", value)], time.time() + 9)
    assert rows_of(here)["a"]["values"] == {"ms": 1}
    assert "error" not in rows_of(here)["a"]


def test_no_row_starts_after_the_budget(tmp_path, machine, capsys):
    suite.measure_rows(make_suite(tmp_path), [make_row("a", dict)], time.time() - 1)
    assert capsys.readouterr().out == f"a: {suite.SPENT}\n"
    assert suite.read_results(tmp_path / "rows.json")["rows"] == {}


def test_table_has_a_line_for_each_value_and_for_a_failure():
    entry = NOW | {"what": "steps", "values": {"ms": 64.7, "tokens/s": 506000.0}}
    failed = NOW | {"what": "x", "error": "a | b", "toy": True, "commit": "e" * 40 + "-dirty"}
    lines = suite.format_table({"a": entry, "b": failed, "c": None}).splitlines()
    assert lines[3:] == [
        "| `a` | steps | 64.7 | ms | card | ccccccc |",
        "| `a` | steps | 506,000 | tokens/s | card | ccccccc |",
        "| `b` | x | failed | a / b | card, toy size | eeeeeee-dirty |",
        "| `c` |  | failed | not measured |  |  |",
    ]


def test_file_of_something_else_is_rejected(tmp_path):
    file = tmp_path / "b.json"
    file.write_text("[]")
    assert refusal(suite.read_results, file).startswith(f"{file}: cannot be read (")


def test_process_that_ends_early_loses_only_its_row(tmp_path, monkeypatch):
    """Row b kills its process; the next process gets the rows after it, and XLA's flags add up."""
    file, started = tmp_path / "rows.json", []

    def run(command, env):
        names = json.loads(command[-1])["rows"]
        started.append((names, env["XLA_FLAGS"]))
        for name in names:
            error = {"error": suite.DID_NOT_END}
            entry = {"time": time.time(), **(error if name == "b" else {})}
            suite.write_results(file, {name: entry}, {})
            if name == "b":
                return subprocess.CompletedProcess(command, -6)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    env = {"XLA_FLAGS": "--row=2"}
    assert suite.run_child(file, ["a", "b", "c"], {}, env) == ["c"]
    assert suite.run_child(file, ["c"], {}, env) == []
    assert started == [(["a", "b", "c"], "--mine=1 --row=2"), (["c"], "--mine=1 --row=2")]
    broken = lambda command, env: subprocess.CompletedProcess(command, 2)
    monkeypatch.setattr(subprocess, "run", broken)
    assert "ended with code 2 before it measured d" in refusal(suite.run_child, file, ["d"], {}, {})


# --- Traces -------------------------------------------------------------------------------------

NAMES = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 9, "args": {"name": "XLA Ops"}},
    {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
]


def event(start_us: float, us: float, name: str, op: str = "", pid: int = 1, tid: int = 7) -> dict:
    args = {"args": {"hlo_op": op}} if op else {}
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start_us, "dur": us, "name": name, **args}


def test_trace_is_summed_by_kind_with_the_gaps_between_kernels():
    kinds = {"fusion.1": "memory", "gemm.2": "matmuls", "copy.3": "copies"}
    events = [
        *NAMES,
        event(5000, 1000, "nvjet_hsh", "gemm.2"),
        event(1000, 2000, "loop_fusion", "fusion.1"),
        event(2500, 1500, "MemcpyD2D", "copy.3"),  # overlaps the one before
        event(6000, 500, "cudnn_sdpa_sm90_flash_bprop_wgmma"),  # inside a CUDA graph: no op
        event(7000, 250, "sm90_xmma_gemm_bf16"),
        event(1000, 9000, "fusion.1", "fusion.1", tid=9),  # not a stream
        event(1000, 9000, "python", pid=2),
    ]
    by_kind, by_kernel = read_trace(events, kinds)
    assert by_kind == {
        "memory": 2, "copies": 1.5, "matmuls": 1.25, "attention, backward": 0.5, "gaps": 1.5
    }  # fmt: skip
    assert by_kernel["gemm.2"] == 1
    assert by_kernel["sm90_xmma_gemm_bf16"] == 0.25


def test_trace_of_a_cpu_has_the_instructions_that_are_kernels():
    events = [
        event(0, 4000, "while.1", "while.1", pid=2),
        event(0, 1000, "dot.1", "dot.1", pid=2),
        event(3000, 1000, "dot.1", "dot.1", pid=2),
    ]
    assert read_trace([*NAMES[3:], *events], {"dot.1": "matmuls"}) == (
        {"matmuls": 2, "gaps": 2},
        {"dot.1": 2},
    )


# --- The rows at toy size -----------------------------------------------------------------------


class NanoGPT:
    """A stand-in for nanoGPT's process."""

    def __init__(self, *args):
        self.versions = {"torch": "none"}

    def load(self, *args) -> None:
        pass

    def ask(self, do: str, **arguments) -> dict:
        return {"seconds": 1.0, "losses": [1.0] * len(arguments.get("lrs", [])), "peak_bytes": None}

    def close(self) -> None:
        pass


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Suite:
    """Return a suite whose rounds are short, and whose baby GPT reads a small text."""
    monkeypatch.setattr(report, "REST_S", 0)
    monkeypatch.setattr(training, "ROUND_S", 0.001)
    monkeypatch.setattr(training, "PARITY_STEPS", 3)
    monkeypatch.setattr(sampling, "NEW_TOKENS", 20)
    monkeypatch.setattr(suite_rows, "NanoGPT", NanoGPT)
    baby = TOY.baby.replace(dataset="tale", data_dir=str(make_data(tmp_path)), max_iters=10)
    return make_suite(tmp_path, replace(TOY, baby=baby, repeats=1))


# Rows of flags measure train_124m.
DIFFERENT = [row for row in ROWS if not row.name.startswith("flag_")]


@pytest.mark.slow
@pytest.mark.parametrize("row", DIFFERENT, ids=lambda row: row.name)
def test_every_row_is_measured_at_toy_size(row, toy):
    entry = suite.measure(toy, row)
    backend = row.name.removeprefix("attention_")
    if backend in ("cudnn", "flash"):
        assert entry["error"].startswith(f"attention={backend!r}: needs an NVIDIA GPU")
    else:
        assert entry.get("error") is None
        assert all(isinstance(value, float | int) for value in entry["values"].values())
    json.dumps(entry)


@pytest.mark.slow
def test_mode_of_nanogpt_that_fails_does_not_hide_the_other_mode(toy, monkeypatch):
    def load(nanogpt, config, tokens, params, mode):
        if mode == "compiled":
            raise NanoGPTError("out of memory")

    monkeypatch.setattr(NanoGPT, "load", load)
    (row,) = [row for row in ROWS if row.name == "nanogpt_124m"]
    found = suite.measure(toy, row)
    assert found["error"] == "nanoGPT compiled: out of memory"
    assert "times as fast as nanoGPT eager" in found["values"]


def test_two_configs_in_turn_have_their_own_times_and_the_second_is_relative_to_the_first(
    toy, monkeypatch
):
    class Model:
        """A stand-in whose steps take a millisecond per block."""

        def __init__(self, config, dataset):
            self.config = config

        def round_steps(self) -> int:
            return 5

        def train(self, steps: int) -> tuple[float, list[float]]:
            return steps * self.config.n_layer / 1000, []

        def summary(self, ms: list[float]) -> dict:
            return {}

    monkeypatch.setattr(suite_rows, "JaxGPT", Model)
    small = toy.sizes.gpt2.replace(n_layer=2)
    values, _ = suite_rows.in_turn(toy, small, small.replace(n_layer=6), "with 6 blocks")
    assert values == pytest.approx(
        {
            "ms per step by default": 2,
            "ms per step with 6 blocks": 6,
            "times as long as by default": 3,
        }
    )


def test_attention_row_counts_the_flops_of_causal_attention(toy, monkeypatch):
    """Two products of half the T x T scores in the forward pass, and five in the backward pass."""
    monkeypatch.setattr(suite_rows, "call_ms", lambda call: [2.0])
    c = toy.sizes.gpt2
    products = c.batch_size * c.n_head * c.block_size**2 * c.head_dim * 2 / 2
    values, _ = suite_rows.time_attention(toy, "reference")
    assert values["TFLOP/s"] == pytest.approx(7 * products / 0.002 / 1e12)


@pytest.mark.parametrize("operation", LEVERS)
def test_lever_replaces_the_own_row_of_the_platform_and_restores_it(operation):
    before, own = dict(TABLE), (operation, current_platform())
    with suite_rows.without(operation):
        assert TABLE[own] is TABLE[operation, ANY]
    assert before == TABLE


@pytest.mark.slow
def test_command_measures_rows_in_processes_of_their_own_and_continues(tmp_path):
    main = "from jaxgpt.cli.commands import main; main()"
    flags = ["--suite=gpu", "--rows=attention_xla,flag_O1", "--json=rows.json"]
    command = [sys.executable, "-c", main, "bench", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    first, second = (subprocess.run(command, **options) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(
        "JAX computes on a CPU, so the rows have toy sizes and two repeats\n"
    )
    assert "| `flag_O1` | train_124m with JAX_OPTIMIZATION_LEVEL=O1 | " in first.stdout
    assert second.stdout.count("two repeats\n") == 1  # the second process had nothing to do
    assert second.stdout.partition("\n\n")[2] == first.stdout.partition("\n\n")[2]
