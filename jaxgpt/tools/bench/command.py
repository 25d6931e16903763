"""`jaxgpt bench`: choose what to time, time it, and report the results."""

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
from jaxgpt.runtime.bucket import local_data_dir
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.runtime.files import atomic_write, check_file_to_write, folder_error
from jaxgpt.tools.bench.chart import draw_chart
from jaxgpt.tools.bench.nanogpt import NanoGPT, NanoGPTError, check_comparable
from jaxgpt.tools.bench.options import BenchArgs
from jaxgpt.tools.bench.report import Bench, Report, describe_machine, show
from jaxgpt.tools.bench.sampling import bench_attention, bench_data, bench_sampling
from jaxgpt.tools.bench.training import bench_training

MAX_TOKENS = 1 << 24  # that a benchmark reads of a dataset's split

BABY = Config(
    dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64, block_size=256,
    n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False, mlp="gelu",
    learning_rate=1e-3, max_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100,
)  # fmt: skip
LAPTOP = {"batch_size": 12, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
GPT2 = Config(vocab_size=50_304, gradient_accumulation_steps=1, bias=False, mlp="gelu")
PRESETS = {
    "cpu": BABY.replace(**LAPTOP, dropout=0.0, max_iters=2000),  # the laptop recipe of its README
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
    """Run the benchmark that the flags ask for, and print a report. Raises `UserError`."""
    check_flags(args)
    check_folders(args)
    if args.chart:
        print("\n".join(draw_chart(args.results, args.out_dir, args.chart)))
        return
    load_before = os.getloadavg()[0]
    name, config = choose(args)
    with TemporaryDirectory() as folder:
        report, facts = run(args, name, config, Path(folder))
    facts["load_before"] = load_before
    if load_before > 0.3 * device.cores():
        note = f"the load average before the start was {load_before:.1f}: this machine was in use"
        report.notes.append(note)
    show(report, facts)
    if args.json:
        try:
            atomic_write(Path(args.json), json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            raise folder_error(args.json, "--json", error) from error


NEEDS = {
    "rows": "suite", "budget_s": "suite", "results": "chart", "out_dir": "chart",
    "torch_python": "compare_to", "compile": "compare_to", "plot": "compare_to",
}  # fmt: skip
WITHOUT_EFFECT = {
    "suite": ("benchmark", "chart", "plot"),
    "chart": ("preset", "config", "benchmark", "repeats", "json", "compare_to"),
}
PICTURES = ".png", ".svg", ".pdf"  # of which matplotlib draws the format


def check_flags(args: BenchArgs) -> None:
    """Raise `UserError` for flags that do not apply together."""
    if args.suite and (args.preset or args.config):
        problem = "has its own configs; try without --preset and --config"
        raise UserError(f"suite={args.suite!r}: {problem}")
    given = {key: value for key, value in vars(args).items() if value != getattr(BenchArgs, key)}
    for other, flags in WITHOUT_EFFECT.items():
        for flag in flags:
            if other in given and flag in given:
                problem = f"has no effect with --{other}; expected one of both"
                raise UserError(f"{flag}={given[flag]!r}: {problem}")
    for flag, other in NEEDS.items():
        if flag in given and not getattr(args, other):
            problem = f"applies only with --{other}; expected both flags"
            raise UserError(f"{flag}={given[flag]!r}: {problem}")
    for flag in "compile", "plot":
        if args.benchmark == "sample" and flag in given:
            problem = "sampling is compared with nanoGPT eager, and has no picture"
            raise UserError(f"{flag}={given[flag]!r}: {problem}; try without --{flag}")
    if args.config and args.preset:
        raise UserError(f"preset={args.preset!r}: given with --config; expected one of the two")
    if args.compare_to and args.benchmark in ("data", "attention"):
        problem = "cannot be compared with nanoGPT; expected train or sample with --compare_to"
        raise UserError(f"benchmark={args.benchmark!r}: {problem}")


def check_folders(args: BenchArgs) -> None:
    """Raise `UserError` for a file that cannot be written, and for an unknown kind of picture."""
    for file in filter(None, (args.json, args.plot, args.chart)):
        check_file_to_write(Path(file))
    for flag in "plot", "chart":
        file = getattr(args, flag)
        if file and Path(file).suffix not in PICTURES:
            expected = f"a name that ends in {', '.join(PICTURES)}"
            raise UserError(f"{flag}={file!r}: not the name of a picture; expected {expected}")


def choose(args: BenchArgs) -> tuple[str, Config]:
    """Start JAX; return the name of the benchmarked config, and the config for this device.

    The compilation cache is off, so that compile times are those of a first run. Presets use one
    accelerator, as nanoGPT does without torchrun. With nanoGPT on the same accelerator, any config
    uses one, and JAX allocates memory only as needed. Raises `UserError`.
    """
    if args.compare_to:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    variants = load_config_file(args.config) if args.config else {"config": Config()}
    config = variants["config"]
    device.start(config.device, float64=config.dtype == "float64")
    jax.config.update("jax_enable_compilation_cache", False)
    is_cpu = device.is_cpu()
    name = args.config or args.preset or ("cpu" if is_cpu else "gpt2")
    if not args.config:
        config = PRESETS[name]
        check_preset(name, args.benchmark, is_cpu)
    elif is_cpu and config.use_cpu_variant:
        config = variants.get("cpu_config", config)
        device.enable_float64(config)
    if not is_cpu and (args.compare_to or not args.config):
        config = config.replace(mesh="data:1")
    config, _ = device.resolve_auto(config)
    if args.compare_to:
        check_comparable(config)
    return name, config


def check_preset(preset: str, benchmark: str, is_cpu: bool) -> None:
    """Reject training GPT-2 on a CPU, and warn of other presets that are slow there."""
    if not is_cpu or preset == "cpu":
        return
    if benchmark == "train" and preset.startswith("gpt2"):
        needs = "training needs an accelerator; expected cpu or baby on a CPU"
        raise UserError(f"preset={preset!r}: {needs}; try --preset=cpu")
    print(f"preset {preset} takes long on a CPU; --preset=cpu is faster", file=sys.stderr)


def run(args: BenchArgs, name: str, config: Config, folder: Path) -> tuple[Report, dict[str, Any]]:
    """Run a benchmark with its files in `folder`; return its report, and all facts for JSON."""
    config, dataset = make_data(config, folder)
    nanogpt = None
    if args.compare_to:
        nanogpt = NanoGPT(args.compare_to, args.torch_python or sys.executable, folder)
    modes = ("eager", "compiled") if args.compile == "both" else (args.compile,)
    plot = Path(args.plot or Path(args.json or "bench").with_suffix(".png"))
    try:
        with Console(stderr=True).status("starting") as status:
            b = Bench(name, config, dataset, nanogpt, modes, args.repeats, plot, status.update)
            report = BENCHMARKS[args.benchmark](b)
    except NanoGPTError as error:
        problem = f"nanoGPT failed ({error}); expected a checkout that runs with --torch_python"
        raise UserError(f"compare_to={args.compare_to!r}: {problem}") from error
    except jax.errors.JaxRuntimeError as error:
        if not device.is_out_of_memory(error):
            raise
        problem = "does not fit in this device's memory; expected a smaller batch; try --config"
        raise UserError(f"batch_size={config.batch_size}: {problem}") from error
    finally:
        if nanogpt:
            nanogpt.close()
    facts = {
        "what": args.benchmark,
        "preset": name,
        "config": config.to_dict(),
        "data": dataset.source,
        "nanogpt": nanogpt and nanogpt.versions,
    }
    return report, facts | describe_machine() | {"results": report.results}


def make_data(config: Config, folder: Path) -> tuple[Config, Dataset]:
    """Write tokens for both sides to `folder`; return the config with their vocab_size, and them.

    The tokens are the first ones of the config's dataset if it is prepared. Otherwise they are 500
    random phrases in random order, so that there is something to learn.
    """
    if is_prepared(local_data_dir(config.data_dir, config.dataset) / config.dataset):
        found = find_dataset(config, config.block_size, config.vocab_size)
        ids = [t.read(0, min(len(t), MAX_TOKENS)) for t in (found.train, found.val)]
        vocab, source, dtype = found.vocab_size, found.source, found.train.dtype
    else:
        vocab, source, rng = config.vocab_size or 65, "synthetic", np.random.default_rng(0)
        phrases = rng.integers(0, vocab, (500, 16), np.uint32)
        ids = [phrases[rng.integers(0, 500, 1 << 17)].ravel() for _ in SPLITS]
        dtype = np.dtype("uint16" if vocab <= 2**16 else "uint32")
    vocab = max(vocab, config.vocab_size)
    splits = []
    for split, tokens in zip(SPLITS, ids, strict=True):
        file = folder / f"{split}.bin"
        tokens.astype(dtype).tofile(file)
        splits.append(TokenSplit([file], dtype.name, vocab))
    train, val = splits
    return config.replace(vocab_size=vocab), Dataset(train, val, vocab, None, source, {})
