"""The commands: `jaxgpt <command>`, train.py and sample.py.

JAX is imported after the command line is parsed, so help and mistakes are answered at once. A
comment at a field of a command's arguments is its --help.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxgpt import __version__
from jaxgpt import config as keys
from jaxgpt.cli.command_line import choose_config, parse_command_line
from jaxgpt.config import UserError, check
from jaxgpt.runtime.config_file import load_config_file

SEPARATOR = "-" * 15  # between samples, as in nanoGPT
Checkpoint = Annotated[str, keys.Pattern(r"best|latest|\d+", "best, latest, or a step")]

OLD_FLAGS = {
    "--what": "--benchmark", "--pairs": "--repeats", "--vs": "--compare_to", "--fit": "--search",
    "--context": "--overflow",
}  # fmt: skip
OLD_VALUES = {"--context": {"halve": "truncate", "exact": "slide"}}


def main() -> None:
    """Run the console script."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"jaxgpt {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        print("usage: jaxgpt {" + ",".join(COMMANDS) + "} ...", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    run(COMMANDS[name], argv)


def run(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    with exit_on_error():
        sys.exit(command(sys.argv[1:] if argv is None else argv))


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a user's mistake into one line and code 2; exit quietly on Ctrl-C or a closed pipe."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(141)


def _parse(args_type: type, argv: list[str], prog: str) -> Any:
    args = tyro.cli(args_type, args=translate_old_flags(argv), prog=prog, use_underscores=True)
    check(args)
    return args


def translate_old_flags(argv: list[str]) -> list[str]:
    """Replace old names of flags, and of their values, by the names now."""
    translated, new_values = [], {}
    for arg in argv:
        name, equals, value = arg.partition("=")
        if name in OLD_FLAGS:
            new_values = OLD_VALUES.get(name, {})
            translated.append(OLD_FLAGS[name] + equals + new_values.get(value, value))
        else:
            translated.append(new_values.get(arg, arg))
            new_values = {}
    return translated


def train(argv: list[str]) -> int:
    """Train: [--config] FILE [--key=value ...]."""
    command_line = parse_command_line(argv)
    config, notes = choose_config(command_line)
    from jaxgpt.train import train

    return train(config, cli_keys=frozenset(command_line.overrides), notes=notes)


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    out_dir: keys.NonEmptyStr = "out"  # The run directory.
    config: str = ""  # The run's config file; needed only if it defines a config class.
    checkpoint: Checkpoint = "best"  # Which checkpoint of the run.


@dataclass(frozen=True, kw_only=True)
class ModelArgs(RunArgs):
    # `resume` is the run; else weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder.
    init_from: keys.InitFrom = "resume"
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"  # Device to run on.


@dataclass(frozen=True, kw_only=True)
class SampleArgs(ModelArgs):
    """Stream samples from a run directory, or from GPT-2 weights."""

    # The prompt; FILE:prompt.txt reads a file. Several make a batch. Default: \n.
    start: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    num_samples: keys.PositiveInt = 10  # Samples of each prompt.
    max_new_tokens: keys.PositiveInt = 500  # Tokens per sample.
    # Below 1 is less random than the model; 0 takes the most likely token.
    temperature: keys.NonNegativeFloat = 0.8
    top_k: keys.NonNegativeInt = 200  # Draw from this many of the most likely tokens; 0 means all.
    # Draw from the most likely tokens that together have this probability.
    top_p: Annotated[float, keys.Range(0, 1)] = 1.0
    # Draw from tokens with at least this fraction of the top token's probability.
    min_p: keys.Fraction = 0.0
    # Above 1, makes tokens that already occurred less likely.
    repetition_penalty: Annotated[float, keys.Range(1)] = 1.0
    # End a sample before this text; may be given several times.
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    seed: keys.Seed = 1337  # Seed of the samples.
    # Past block_size: continue from the last half, or slide token by token as nanoGPT does.
    overflow: Literal["truncate", "slide"] = "truncate"
    # Compute dtype; `auto` is the device's. On a CPU bfloat16 is for weights only, and faster.
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    interactive: bool = False  # Ask for prompts, one per line, until an empty one.


def sample(argv: list[str]) -> None:
    """Stream samples: --out_dir=DIR | --init_from=WEIGHTS [--start=TEXT ...]."""
    args = _parse(SampleArgs, argv, "sample.py")
    prompts = [read_start(start) for start in args.start or ("\n",)]
    from jaxgpt.interop import huggingface
    from jaxgpt.runtime import device
    from jaxgpt.runtime.mesh import local_mesh
    from jaxgpt.sample import Sampler

    config, load, tokenizer = huggingface.load_trained(
        args.init_from, args.out_dir, args.checkpoint, config_file=args.config
    )
    own_dtype = "float64" if config.dtype == "float64" else "auto"  # else this device's
    dtype = own_dtype if args.dtype == "auto" else args.dtype
    device.start(args.device, float64="float64" in (config.dtype, dtype))
    params, step = load(local_mesh())
    resolved, _ = device.resolve_auto(config.replace(attention="auto", dropout=0.0, dtype=dtype))
    sampler, encoder = Sampler(resolved).load(params), tokenizer()
    source = args.init_from if step is None else f"{args.out_dir}, step {step}"
    print(f"{source}, {resolved.dtype}", file=sys.stderr)
    if not args.interactive:
        print_samples(args, sampler, encoder, prompts)
        return
    try:
        while prompt := input("> "):
            try:
                print_samples(args, sampler, encoder, [prompt])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    except EOFError:
        print()


def read_start(start: str) -> str:
    """Return a prompt: `start`, or the text of the file in FILE:name, as in nanoGPT."""
    if not start.startswith("FILE:"):
        return start
    file = Path(start.removeprefix("FILE:"))
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"start={start!r}: {error}") from error


def print_samples(args: SampleArgs, sampler: Any, tokenizer: Any, prompts: list[str]) -> None:
    """Print every sample of every prompt: stream the first, print the others when all are done."""
    from jaxgpt.data.text_stream import generate_text
    from jaxgpt.runtime.metrics import escape_controls
    from jaxgpt.sample import SamplingParams

    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    options: dict[str, Any] = {name: getattr(args, name) for name in ("stop", "seed", "overflow")}
    options["params"] = SamplingParams(**{name: getattr(args, name) for name in names})
    show = partial(escape_controls, on_terminal=sys.stdout.isatty())
    texts, began = list(prompts), time.perf_counter()
    stream = generate_text(sampler, tokenizer, prompts, args.max_new_tokens, **options)
    print(show(texts[0]), end="", flush=True)  # only now: a prompt may be refused
    for pieces in stream:
        print(show(pieces[0]), end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    print(f"\n{SEPARATOR}")
    for text in texts[1:]:
        print(f"{show(text)}\n{SEPARATOR}")
    seconds = time.perf_counter() - began
    print(f"{sampler.num_generated / seconds:,.0f} tokens/s, compiling included", file=sys.stderr)


@dataclass(frozen=True)
class PrepareArgs:
    """Turn a text into token files: DATA_DIR/<name>/{train.bin,val.bin,meta.json,...}."""

    # A corpus that jaxgpt knows (shakespeare_char, shakespeare, shakespeare_plays,
    # shakespeare_sonnets, openwebtext, fineweb_edu), a UTF-8 text file, a .jsonl of prompts and
    # completions, or documents: a parquet file, or a folder of .parquet or .txt files.
    dataset: tyro.conf.Positional[keys.NonEmptyStr]
    # char, byte, gpt2, a tokenizer.json, or a corpus whose tokenizer to use. Default: the corpus's
    # own; char for a file, gpt2 for documents.
    tokenizer: str = ""
    data_dir: keys.NonEmptyStr = "data"  # Folder of all datasets.
    # Documents only: fraction for validation. 0 means 0.0005 of a corpus, 0.01 of your own.
    val_share: keys.Fraction = 0.0
    # Documents only: i/n makes every n-th piece from the i-th, to divide work among machines.
    shard: str = ""
    # Documents only: number of tokenizing processes; 0 means one per core.
    processes: keys.NonNegativeInt = 0


def prepare(argv: list[str]) -> None:
    """Write token files: DATASET-or-TEXT-FILE [--tokenizer=NAME]."""
    args = _parse(PrepareArgs, argv, "jaxgpt prepare")
    from jaxgpt.data.prepare import prepare

    folder = prepare(**vars(args))
    meta = folder / "meta.json"
    if meta.exists():
        print(meta.read_text())
    print(folder)


@dataclass(frozen=True, kw_only=True)
class EvalArgs(ModelArgs):
    """Evaluate a run or GPT-2 weights: the loss on a whole validation split, or HellaSwag."""

    # The loss on the validation split, or the accuracy on HellaSwag.
    task: Literal["loss", "hellaswag"] = "loss"
    dataset: str = ""  # Dataset of the validation split; empty means the run's.
    # HellaSwag's questions; empty means DATA_DIR/hellaswag/hellaswag_val.jsonl.
    hellaswag_file: str = ""
    data_dir: str = ""  # Folder of all datasets; empty means the run's, or data for weights.
    mesh: str = ""  # Devices per axis, as in training; empty puts all on data.


def evaluate(argv: list[str]) -> None:
    """Print how good a model is: --out_dir=DIR | --init_from=WEIGHTS [--task=NAME]."""
    args = _parse(EvalArgs, argv, "jaxgpt eval")
    from jaxgpt.runtime import device
    from jaxgpt.tools.evaluation import evaluate
    from jaxgpt.tools.hellaswag import hellaswag

    device.start(args.device)
    model = args.out_dir, args.checkpoint, args.data_dir, args.config
    options = {"init_from": args.init_from, "mesh": args.mesh}
    if args.task == "hellaswag":
        result = hellaswag(*model, file=args.hellaswag_file, **options)
    else:
        result = evaluate(*model, dataset=args.dataset, **options)
    for name, value in result.items():
        print(f"{name}: {value}")


@dataclass(frozen=True, kw_only=True)
class ExportArgs(RunArgs):
    """Write a run as a folder that transformers loads as a GPT2LMHeadModel."""

    # The folder to make: config.json, model.safetensors and the tokenizer's files.
    to: keys.NonEmptyStr


def export(argv: list[str]) -> None:
    """Write a folder that transformers loads: --out_dir=DIR --to=FOLDER."""
    args = _parse(ExportArgs, argv, "jaxgpt export")
    from jaxgpt.interop.export import export
    from jaxgpt.runtime import device

    device.start("cpu")  # it only copies
    step = export(args.out_dir, args.checkpoint, args.to, args.config)
    print(f"{args.to} holds step {step} of {args.out_dir}")


@dataclass(frozen=True)
class BenchArgs:
    """Time jaxgpt, alone or alternating with PyTorch nanoGPT."""

    # Whole training steps, sampling, batches alone, or the attention back ends alone.
    benchmark: Literal["train", "sample", "data", "attention"] = "train"
    config: str = ""  # A config file to time, instead of a preset.
    # nanoGPT's laptop recipe, its baby GPT, or GPT-2. Default: cpu on a CPU, else gpt2.
    preset: Literal["", "cpu", "baby", "gpt2", "gpt2-xl"] = ""
    # A checkout of PyTorch nanoGPT to alternate with (benchmark=train and sample).
    compare_to: str = ""
    torch_python: str = ""  # A Python that has torch; empty means this one.
    # How nanoGPT runs: eager, under torch.compile, or both.
    compile: Literal["both", "eager", "compiled"] = "both"
    # Repeats of each side; also the number of samples of other measurements.
    repeats: keys.PositiveInt = 5
    json: str = ""  # Write all measurements, with every sample, to this file.
    plot: str = ""  # Plot of both sides' losses. Default: beside the JSON file, or bench.png.


def bench(argv: list[str]) -> None:
    """Time training or sampling: [--preset=NAME | --config FILE] [--compare_to NANOGPT]."""
    args = _parse(BenchArgs, argv, "jaxgpt bench")
    from jaxgpt.tools.bench.command import BenchOptions, bench

    bench(BenchOptions(**vars(args)))


@dataclass(frozen=True)
class AblateArgs:
    """Train a baseline and each feature of the menu with several seeds, and compare them."""

    config: keys.NonEmptyStr = "configs/ablate.py"  # The baseline.
    features: tuple[str, ...] = ()  # Which features of the menu; all if none is named.
    seeds: keys.PositiveInt = 5  # Runs of each feature, with seeds 1, 2, ...
    # Folder of the runs, and of menu.md, menu.png and menu.json.
    out_dir: keys.NonEmptyStr = "out/ablate"


def ablate(argv: list[str]) -> int:
    """Compare features with a baseline: [--config FILE] [--features NAME ...] [--seeds=N]."""
    args = _parse(AblateArgs, argv, "jaxgpt ablate")
    configs = load_config_file(args.config)
    from jaxgpt.runtime import device
    from jaxgpt.tools.ablate import ablate

    config = configs["config"]
    device.start(config.device)
    if device.is_cpu():
        config = configs.get("cpu_config", config)
    return ablate(config, list(args.features), args.seeds, args.out_dir)


@dataclass(frozen=True)
class PlanArgs:
    """Compile a run's training step for hardware that is not here, and print what it would need.

    The config file and its keys follow, as for training: --config FILE [--key=value ...].
    """

    # h100:8, h200:8x8 (machines x GPUs), v5e:4x4, v5p:4x4x4; also a100, b200, v6e.
    topology: str = ""
    search: bool = False  # Find the least recomputation, then the largest batch_size, that fit.


def plan(argv: list[str]) -> int:
    """Print what a run would need: --config FILE --topology=CHIP:SHAPE [--search] [--key=value]."""
    args, flags = tyro.cli(
        PlanArgs,
        args=translate_old_flags(argv),
        prog="jaxgpt plan --config FILE",
        use_underscores=True,
        return_unknown_args=True,
    )
    command_line = parse_command_line(flags)
    config = command_line.config.replace(**command_line.overrides)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxgpt.tools import plan

    return 0 if plan.run(config, args.topology, args.search, print) else 1


COMMANDS = {
    "train": train, "sample": sample, "prepare": prepare, "eval": evaluate,
    "export": export, "bench": bench, "ablate": ablate, "plan": plan,
}  # fmt: skip
