"""`jaxgpt bench`: choose what to time, time it, and write what was found."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import find_dataset
from jaxgpt.data.tokens import SPLITS, Dataset, TokenSplit, is_prepared
from jaxgpt.runtime import device
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.tools.bench.nanogpt import NanoGPT, NanoGPTError, check_comparable
from jaxgpt.tools.bench.options import BenchArgs
from jaxgpt.tools.bench.report import Bench, Report, describe_machine, show
from jaxgpt.tools.bench.sampling import bench_attention, bench_data, bench_sampling
from jaxgpt.tools.bench.training import bench_training

MAX_TOKENS = 1 << 24  # of a dataset that a benchmark reads

BABY = Config(
    dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64, block_size=256,
    n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False, mlp="gelu",
    learning_rate=1e-3, max_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100,
)  # fmt: skip
LAPTOP = {"batch_size": 12, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
GPT2 = Config(vocab_size=50_304, gradient_accumulation_steps=1, bias=False, mlp="gelu")
PRESETS = {
    "cpu": BABY.replace(**LAPTOP, dropout=0.0, max_iters=2000),  # nanoGPT's README
    "baby": BABY,
    "gpt2": GPT2,
    "gpt2-xl": GPT2.replace(batch_size=4, n_layer=48, n_head=25, n_embd=1600),
}
BENCHMARKS: dict[str, Callable[[Bench], Report]] = {
    "train": bench_training,
    "sample": bench_sampling,
    "data": bench_data,
    "attention": bench_attention,
}


def bench(args: BenchArgs) -> None:
    """Run what the command line asks for, and print what was found. Raises `UserError`."""
    for file in filter(None, (args.json, args.plot)):
        if not Path(file).parent.is_dir():
            raise UserError(f"{file}: there is no folder {Path(file).parent}")
    load_before = os.getloadavg()[0]
    name, config = choose(args)
    with TemporaryDirectory() as folder:
        report, facts = run(args, name, config, Path(folder))
    facts["load_before"] = load_before
    if load_before > 0.3 * (os.cpu_count() or 1):
        note = f"load average before the start: {load_before:.1f}; others used this machine"
        report.notes.append(note)
    if args.json:
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    show(report, facts)


def choose(args: BenchArgs) -> tuple[str, Config]:
    """Start JAX -> the name of what is benchmarked, and its config for this device.

    The compilation cache is off: compile times are those of a first run. Beside nanoGPT, JAX takes
    device memory only as needed, and one accelerator, as nanoGPT does without torchrun.
    """
    preset, is_comparison = args.preset, bool(args.compare_to)
    if args.config and preset:
        raise UserError(f"--preset={preset}: name a preset or a config file, not both")
    if is_comparison:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    variants = load_config_file(args.config) if args.config else {}
    c = variants.get("config", Config())
    device.start(c.device, float64=c.dtype == "float64")
    jax.config.update("jax_enable_compilation_cache", False)
    is_cpu = device.is_cpu()
    if args.config:
        c = variants.get("cpu_config", c) if is_cpu and c.use_cpu_variant else c
    else:
        if is_cpu and args.benchmark == "train" and preset.startswith("gpt2"):
            needs = "needs an accelerator; for a CPU there is --preset=cpu"
            raise UserError(f"--preset={preset}: {needs}")
        if is_cpu and preset not in ("", "cpu"):
            print(
                f"preset {preset} at a CPU: this takes long; --preset=cpu does not", file=sys.stderr
            )
        preset = preset or ("cpu" if is_cpu else "gpt2")
        c = PRESETS[preset]
    if is_comparison and not is_cpu:
        c = c.replace(mesh="data:1")
    c, _ = device.resolve_auto(c)
    if is_comparison:
        check_comparable(c)
    return args.config or preset, c


def run(args: BenchArgs, name: str, c: Config, folder: Path) -> tuple[Report, dict[str, Any]]:
    """Run a benchmark, with its files in `folder` -> its report, and all of it for JSON."""
    c, dataset = make_data(c, folder)
    nanogpt = None
    if args.compare_to:
        nanogpt = NanoGPT(args.compare_to, args.torch_python or sys.executable, folder)
    modes = ("eager", "compiled") if args.compile == "both" else (args.compile,)
    plot = Path(args.plot or Path(args.json or "bench").with_suffix(".png"))
    try:
        with Console(stderr=True).status("starting") as status:
            b = Bench(name, c, dataset, nanogpt, modes, args.repeats, plot, status.update)
            report = BENCHMARKS[args.benchmark](b)
    except NanoGPTError as error:
        raise UserError(f"--compare_to {args.compare_to}: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"batch_size={c.batch_size}: does not fit on this device") from error
    finally:
        if nanogpt:
            nanogpt.close()
    facts = {"what": args.benchmark, "preset": name, "config": c.to_dict()}
    facts |= {"data": dataset.source, "nanogpt": nanogpt and nanogpt.versions}
    return report, facts | describe_machine() | {"results": report.results}


def make_data(c: Config, folder: Path) -> tuple[Config, Dataset]:
    """Write tokens for both sides to `folder` -> the config with their vocabulary, the tokens.

    They are the first ones of the dataset if it is prepared. Else they are made up from 500
    phrases that follow each other at random, so that there is something to learn.
    """
    if is_prepared(Path(c.data_dir, c.dataset)):
        found = find_dataset(c, c.block_size)
        ids = [t.read(0, min(len(t), MAX_TOKENS)) for t in (found.train, found.val)]
        vocab, source = found.vocab_size, found.source
    else:
        vocab, source, rng = c.vocab_size or 65, "synthetic", np.random.default_rng(0)
        phrases = rng.integers(0, vocab, (500, 16), np.uint32)
        ids = [phrases[rng.integers(0, 500, 1 << 17)].ravel() for _ in SPLITS]
    vocab = max(vocab, c.vocab_size)
    dtype = "uint16" if vocab <= 2**16 else "uint32"
    files = [folder / f"{split}.bin" for split in SPLITS]
    for file, tokens in zip(files, ids, strict=True):
        tokens.astype(dtype).tofile(file)
    train, val = (TokenSplit([file], dtype, vocab) for file in files)
    return c.replace(vocab_size=vocab), Dataset(train, val, vocab, None, source, {})
