"""Test the benchmark: statistics, equal work for both sides, and output."""

import json
import os
import subprocess
import sys
from math import erf
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import CHILD_ENV, ROOT, refusal, write_config

from jaxgpt import resolve
from jaxgpt.config import Config, RunConfig, UserError
from jaxgpt.data.prepare import prepare
from jaxgpt.data.tokens import Dataset, TokenSplit
from jaxgpt.model import init_params
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.sample import Sampler, truncated_len
from jaxgpt.tools.bench import command, nanogpt, report, sampling, training
from jaxgpt.tools.bench.chart import draw_chart
from jaxgpt.tools.bench.options import BenchArgs

TINY = {
    "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "batch_size": 4, "vocab_size": 20,
    "gradient_accumulation_steps": 2, "mlp": "gelu", "max_iters": 100, "warmup_iters": 0,
    "dataset": "none",
}  # fmt: skip
RESOLVED = Config(**TINY, dtype="float32", attention="reference")


# --- Statistics ---------------------------------------------------------------------------------


def test_quartiles_of_unsorted_samples_are_correct():
    assert report.quartiles([4.0, 0.0, 3.0, 1.0, 2.0]) == {"median": 2, "q1": 1, "q3": 3}


def test_interleaved_runs_alternate_and_give_paired_ratios(monkeypatch):
    monkeypatch.setattr(report, "REST_S", 0)
    turns, seconds = [], iter([1.0, 2.0, 3.0, 2.0, 4.0, 2.0, 1.0, 2.0, 8.0])

    def turn(name: str) -> float:
        turns.append(name)
        return next(seconds)

    runs = [lambda: turn("A"), lambda: turn("a")]
    first, second = report.interleaved(runs, lambda: turn("B"), 3, ("a_s", "b_s"))
    assert turns == ["A", "a", "B"] * 3
    assert first["pairs"][0] == {"a_s": 1, "b_s": 3, "ratio": 3}
    assert [pair["ratio"] for pair in first["pairs"]] == [3, 1, 8]
    assert (first["ratio"], first["range"]) == (3, [1, 8])
    assert [pair["ratio"] for pair in second["pairs"]] == [1.5, 0.5, 4]


# --- Presets ------------------------------------------------------------------------------------


def test_presets_equal_the_quick_start_with_nanogpt_learning_rate():
    quick = load_config_file(str(ROOT / "configs" / "shakespeare.py"))
    own = {*RunConfig.__dataclass_fields__, "lr_decay_iters"} - {"max_iters"}
    shared = lambda c: {key: value for key, value in c.to_dict().items() if key not in own}
    assert shared(command.PRESETS["baby"]) == shared(quick["config"])
    cpu = quick["cpu_config"].replace(learning_rate=1e-3)
    assert shared(command.PRESETS["cpu"]) == shared(cpu)


@pytest.mark.parametrize(("name", "millions"), [("gpt2", 124), ("gpt2-xl", 1557)])
def test_gpt2_presets_have_as_many_parameters_as_gpt2(name, millions):
    c = command.PRESETS[name]
    assert round((resolve.count_params(c) + c.block_size * c.n_embd) / 1e6) == millions


# --- Side by side -------------------------------------------------------------------------------


def nanogpt_loss(w: dict, tokens_BT: np.ndarray, heads: int) -> float:
    """Run nanoGPT's forward pass in NumPy from a state dict; return the mean cross-entropy."""
    x_BT, y_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    (B, T), D = x_BT.shape, w["transformer.wpe.weight"].shape[1]

    def norm(name: str, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    linear = lambda name, x: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    split = lambda x: x.reshape(B, T, heads, D // heads).transpose(0, 2, 1, 3)
    gelu = lambda x: x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    x = w["transformer.wte.weight"][x_BT] + w["transformer.wpe.weight"][:T]
    for i in range(sum(key.endswith("ln_1.weight") for key in w)):
        h = f"transformer.h.{i}"
        q, k, v = map(split, np.split(linear(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x)), 3, axis=-1))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(D // heads)
        weights = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
        x = x + linear(f"{h}.attn.c_proj", mixed.reshape(B, T, D))
        x = x + linear(f"{h}.mlp.c_proj", gelu(linear(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x))))
    logits = norm("transformer.ln_f", x) @ w["lm_head.weight"].T
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(np.take_along_axis(logits, y_BT[..., None], -1).mean())


class NumpyNanoGPT:
    """A stand-in for nanoGPT's process that computes the loss of the first requested step."""

    def __init__(self):
        self.asked, self.closed = [], False

    def load(self, c: Config, tokens: TokenSplit, params: dict, mode: str) -> None:
        self.config, self.tokens, self.mode = c, tokens, mode
        self.weights = nanogpt.to_nanogpt(c, params)

    def ask(self, do: str, **arguments) -> dict:
        self.asked.append((self.mode, do, arguments))
        if do != "train":
            return {}
        if self.mode == "compiled":
            raise nanogpt.NanoGPTError("no compiler")
        first = np.array(arguments["starts"][0])
        assert first.shape == (self.config.gradient_accumulation_steps, self.config.batch_size)
        rows = [self.tokens.read(int(start), self.config.block_size + 1) for start in first.flat]
        loss = nanogpt_loss(self.weights, np.stack(rows).astype(int), self.config.n_head)
        return {"seconds": 1.0, "losses": [loss] * len(arguments["lrs"]), "peak_bytes": None}

    def close(self) -> None:
        self.closed = True


def tiny_dataset(folder: Path) -> Dataset:
    folder.mkdir(exist_ok=True)
    _, dataset = command.make_data(RESOLVED.replace(data_dir=str(folder)), folder)
    return dataset


@pytest.mark.parametrize("keys", [{}, {"scan_layers": True, "bias": False, "dropout": 0.5}])
@pytest.mark.slow
def test_jaxgpt_and_nanogpt_get_the_same_weights_and_windows(tmp_path, monkeypatch, keys):
    monkeypatch.setattr(report, "REST_S", 0)
    monkeypatch.setattr(training, "ROUND_S", 0.001)
    monkeypatch.setattr(training, "PARITY_STEPS", 3)
    side, dataset, plot = NumpyNanoGPT(), tiny_dataset(tmp_path), tmp_path / "b.png"
    modes, config = ("eager", "compiled"), RESOLVED.replace(**keys)
    found = training.bench_training(report.Bench("tiny", config, dataset, side, modes, 2, plot))
    parity, eager = found.results["parity"], found.results["eager"]
    assert parity["jaxgpt"][0] == pytest.approx(parity["nanogpt"][0], rel=1e-5)
    assert parity["jaxgpt"][2] != parity["jaxgpt"][0]
    differences = np.abs(np.subtract(parity["jaxgpt"], parity["nanogpt"]))
    assert parity["largest_difference"] == differences.max()
    assert len(eager["pairs"]) == 2
    assert found.results["compiled"] == {"error": "no compiler"}
    assert [row[0] for row in found.rows] == ["jaxgpt", "nanoGPT eager", "nanoGPT compiled"]
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert plot.stat().st_size > 1000
    assert side.closed
    rounds = [a["starts"] for mode, do, a in side.asked if (mode, do) == ("eager", "train")]
    assert rounds[-2] != rounds[-3]  # every round takes new windows


@pytest.mark.parametrize(
    "keys",
    [
        {"mlp": "gelu_tanh"},
        {"norm": "rmsnorm"},
        {"n_kv_head": 1},
        {"mlp_dim": 24},
        {"causal": False},
        {"freeze": "embed/"},
        {"remat": "full"},
        {"cautious_weight_decay": True},
        {"skip_loss_spikes": 5.0},
    ],
)
def test_config_that_nanogpt_cannot_run_is_rejected(keys):
    nanogpt.check_comparable(RESOLVED)
    nanogpt.check_comparable(RESOLVED.replace(n_kv_head=2, mlp_dim=64))
    key = next(iter(keys))
    with pytest.raises(UserError, match=rf"^{key}=.*: nanoGPT does not have it; expected {key}="):
        nanogpt.check_comparable(RESOLVED.replace(**keys))


def test_config_subclass_is_rejected_for_comparison_with_nanogpt():
    class Bigram(Config):
        pass

    with pytest.raises(UserError, match=r"^--compare_to: nanoGPT has no Bigram; "):
        nanogpt.check_comparable(Bigram(**TINY))


def test_synthetic_data_is_reproducible_and_can_be_learnt(tmp_path):
    a, b = (tiny_dataset(tmp_path / name) for name in "ab")
    ids = a.train.read(0, len(a.train))
    np.testing.assert_array_equal(ids, b.train.read(0, len(b.train)))
    pairs = np.bincount(ids[:-1].astype(int) * 20 + ids[1:], minlength=400) / len(ids)
    alone = np.bincount(ids, minlength=20) / len(ids)
    entropy = lambda p: -(p[p > 0] * np.log(p[p > 0])).sum()
    assert entropy(pairs) - entropy(alone) < entropy(alone) - 0.01  # a token tells of the next


def test_prompts_and_completions_keep_their_masked_ids(tmp_path):
    """Their token files have int32 ids, and those of prompts are stored as -1 - id."""
    lines = [json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    folder = prepare(str(tmp_path / "sums.jsonl"), str(tmp_path))
    _, dataset = command.make_data(
        RESOLVED.replace(dataset="sums", data_dir=str(tmp_path), vocab_size=0), tmp_path
    )
    ids = np.fromfile(folder / "train.bin", np.int32)
    assert (ids < 0).any()
    np.testing.assert_array_equal(dataset.train.read(0, len(dataset.train)), ids)


@pytest.mark.parametrize("tie", [True, False])
def test_bytes_of_decoding_are_those_of_the_weights_and_of_the_cache(tie, monkeypatch):
    monkeypatch.setattr(sampling, "NEW_TOKENS", TINY["block_size"])
    c = Config(**TINY, tie_embeddings=tie, position="rope", bias=False, dtype="float32")
    sampler = sampling.make_samplers(c)[""]
    D, L, V = c.n_embd, c.n_layer, sampler.params["embed"]["kernel"].shape[0]
    weights = L * (12 * D * D + 2 * D) + D + V * D  # the output layer, tied or not
    cache = 2 * L * D * np.mean(range(1, c.block_size + 1))
    found = sampling.decode_bytes(sampler, batch=3)
    assert found == pytest.approx(4 * (weights + 3 * cache))


def test_bytes_of_the_cache_are_those_of_the_lengths_that_sampling_reaches(monkeypatch):
    """Past block_size, a text restarts from its last half."""
    monkeypatch.setattr(sampling, "NEW_TOKENS", 3 * TINY["block_size"])
    c = Config(**TINY, dtype="float32", attention="reference")
    sampler, lengths = sampling.make_samplers(c)[""], []
    T = c.block_size
    for n in range(1, 3 * T + 1):
        lengths.append(n if n <= T else lengths[-1] + 1)
        if lengths[-1] > T:
            lengths[-1] = truncated_len(T)
    growth = sampling.decode_bytes(sampler, batch=3) - sampling.decode_bytes(sampler, batch=2)
    assert growth == pytest.approx(4 * 2 * c.n_layer * c.n_embd * np.mean(lengths))


def test_batch_that_does_not_fit_leaves_the_results_of_smaller_batches(monkeypatch):
    def generate(sampler, batch, overflow="truncate"):
        if batch > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return 0.1, 0.2

    monkeypatch.setattr(sampling, "generate", generate)
    c = Config(**TINY, dtype="float32", attention="reference")
    nothing: Any = [None] * 6
    found = sampling.bench_sampling(report.Bench("tiny", c, Dataset(*nothing)))
    assert [row[0] for row in found.rows[:2]] == ["1", "8"]
    assert "64 sequences do not fit in this device's memory" in found.notes


def test_samples_are_the_same_on_fewer_devices():
    c = Config(**TINY, dtype="float32", attention="reference")
    params = init_params(c, jax.random.key(0))
    prompts = [np.zeros(1, np.int32)] * 4
    one, all_devices = (
        np.concatenate(list(s.load(params).generate(prompts, max_new_tokens=20)), axis=1)
        for s in (Sampler(c, most_devices=1), Sampler(c))
    )
    np.testing.assert_array_equal(one, all_devices)


def test_answer_that_is_no_json_is_the_error_of_nanogpt(tmp_path):
    (tmp_path / "model.py").write_text("")
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho Welcome\n")
    program.chmod(0o755)
    message = refusal(nanogpt.NanoGPT, str(tmp_path), str(program), tmp_path)
    assert "its process printed 'Welcome'" in message


def test_commit_of_a_checkout_with_a_new_file_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "__file__", str(tmp_path / "jaxgpt/tools/bench/report.py"))
    new = tmp_path / "jaxgpt" / "new.py"
    new.parent.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in ["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=first"]:
        subprocess.run([*git, *words], check=True)
    before = report.describe_machine()["commit"]
    assert len(before) == 40
    new.write_text("x = 1\n")
    first = report.describe_machine()["commit"]
    new.write_text("x = 2\n")
    assert len({before, first, report.describe_machine()["commit"]}) == 3


# --- User errors and the command ----------------------------------------------------------------


def test_file_to_write_that_is_a_folder_is_rejected(tmp_path):
    message = refusal(command.check_folders, BenchArgs(json=str(tmp_path)))
    assert message == f"{tmp_path}: is a folder; expected a file to write"


def test_nanogpt_that_cannot_start_is_rejected_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"^compare_to=.*: has no model\.py; .*; try git clone "):
        nanogpt.NanoGPT(str(tmp_path), sys.executable, tmp_path)
    (tmp_path / "model.py").write_text("raise ImportError('nothing here')\n")
    with pytest.raises(UserError, match=r"^torch_python='nowhere/python': No such file"):
        nanogpt.NanoGPT(str(tmp_path), "nowhere/python", tmp_path)
    with pytest.raises(UserError, match=r"^torch_python=.*: \w*Error: (No module|nothing here)"):
        nanogpt.NanoGPT(str(tmp_path), sys.executable, tmp_path)


def test_nanogpt_ends_with_the_benchmark_in_the_middle_of_a_command():
    child = "from jaxgpt.tools.bench.torch_server import exit_with_parent as run; print(1); run()"
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-uc", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
time.sleep(0.5)
"""
    command = [sys.executable, "-c", parent]
    subprocess.run(command, env=CHILD_ENV, stderr=subprocess.PIPE, check=True, timeout=60)
    # returns once the child, which shares stderr, has ended


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"config": "configs/shakespeare.py", "preset": "cpu"},
            "preset='cpu': given with --config; expected one of the two",
        ),
        ({"rows": "muon"}, "rows='muon': applies only with --suite; expected both flags"),
        ({"budget_s": 9}, "budget_s=9: applies only with --suite; expected both flags"),
        (
            {"results": ("a.json",)},
            "results=('a.json',): applies only with --chart; expected both flags",
        ),
        (
            {"torch_python": "p"},
            "torch_python='p': applies only with --compare_to; expected both flags",
        ),
        (
            {"compile": "eager"},
            "compile='eager': applies only with --compare_to; expected both flags",
        ),
        (
            {"suite": "gpu", "chart": "c.png"},
            "chart='c.png': has no effect with --suite; expected one of both",
        ),
        (
            {"chart": "c.png", "results": ("a.json",), "preset": "cpu"},
            "preset='cpu': has no effect with --chart; expected one of both",
        ),
        (
            {"benchmark": "sample", "compare_to": "nanoGPT", "compile": "compiled"},
            "compile='compiled': sampling is compared with nanoGPT eager, and has no picture; try "
            "without --compile",
        ),
        (
            {"chart": "picture", "results": ("a.json",)},
            "chart='picture': not the name of a picture; expected a name that ends in .png, .svg, "
            ".pdf",
        ),
        (
            {"benchmark": "data", "compare_to": "nanoGPT"},
            "benchmark='data': cannot be compared with nanoGPT; expected train or sample with "
            "--compare_to",
        ),
    ],
)
def test_flags_that_do_not_apply_together_are_rejected(flags, message):
    assert refusal(command.bench, BenchArgs(**flags)) == message


def run_bench(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    write_config(folder / "tiny.py", TINY)
    main = "from jaxgpt.cli.commands import main; main()"
    line = [sys.executable, "-c", main, "bench", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_bench_command_prints_a_table_and_writes_every_sample(tmp_path):
    done = run_bench(tmp_path, "--config=tiny.py", "--json=out.json", "--repeats=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train, tiny.py: ")
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"hardware", "versions", "commit", "config", "data", "what"} <= found.keys()
    mine = found["results"]["jaxgpt"]
    assert len(mine["samples_ms"]) == 4
    assert mine["step_ms"]["q1"] <= mine["step_ms"]["median"] <= mine["step_ms"]["q3"]
    tokens = 4 * 2 * 8
    assert mine["tokens_per_s"] == pytest.approx(1000 * tokens / mine["step_ms"]["median"])
    assert mine["memory_bytes"] > 4 * 2 * 16  # at least some weights
    assert sum(mine["kernels"].values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "attention"])
def test_data_and_attention_are_timed(tmp_path, what):
    flags = f"--benchmark={what}", "--json=out.json", "--repeats=1"
    done = run_bench(tmp_path, "--config=tiny.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{what}, tiny.py: ")
    assert json.loads((tmp_path / "out.json").read_text())["results"]


def test_chart_shows_a_run_beside_the_speedups_of_two_files(tmp_path):
    results = []
    for name, ratio in ("cpu", 2.0), ("baby", 3.0):
        facts = {"preset": name, "results": {"eager": {"ratio": ratio, "range": [1.5, 3.5]}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
        results.append(str(tmp_path / f"{name}.json"))
    rows = [{"step": 1, "time": 5.0, "loss": 3.0}, {"step": 2, "time": 6.0, "val_loss": 2.5}]
    for count, said in (1, "no validation loss; expected a run that was evaluated"), (2, ""):
        metrics = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (tmp_path / "metrics.jsonl").write_text(metrics)
        arguments = results, str(tmp_path), str(tmp_path / "chart.png")
        if said:
            assert said in refusal(draw_chart, *arguments)
        else:
            lines = draw_chart(*arguments)
    assert lines == [
        "cpu: training, nanoGPT eager: 2.00 (1.50-3.50)",
        "baby: training, nanoGPT eager: 3.00 (1.50-3.50)",
    ]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_gpt2_preset_on_a_cpu_is_rejected(tmp_path):
    done = run_bench(tmp_path, "--preset=gpt2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(
        "error: preset='gpt2': training needs an accelerator"
    )


@pytest.mark.skipif(
    not {"JAXGPT_TORCH_PYTHON", "JAXGPT_NANOGPT"} <= os.environ.keys(),
    reason="needs a Python with torch and a checkout: JAXGPT_TORCH_PYTHON, JAXGPT_NANOGPT",
)
@pytest.mark.parametrize("what", ["train", "sample"])
def test_benchmark_with_real_nanogpt_completes_and_losses_agree(tmp_path, what):
    torch = f"--torch_python={os.environ['JAXGPT_TORCH_PYTHON']}"
    vs = f"--compare_to={os.environ['JAXGPT_NANOGPT']}"
    flags = (
        "--config=tiny.py",
        "--json=o.json",
        "--repeats=2",
        "--compile=eager",
        f"--benchmark={what}",
    )
    done = run_bench(tmp_path, vs, torch, *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    if what == "train":
        assert results["parity"]["largest_difference"] < 1e-4
        assert len(results["eager"]["pairs"]) == 2
    else:
        assert len(results["nanogpt_slide"]["pairs"]) == 2
