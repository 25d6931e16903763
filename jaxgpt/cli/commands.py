"""`jaxgpt <command>`, and what train.py and sample.py call.

Imports of JAX wait until a command line has been read: help and mistakes are answered at once.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxgpt.cli.command_line import cli_keys, from_command_line, load
from jaxgpt.config import (
    Fraction,
    InitFrom,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    Pattern,
    PositiveInt,
    Range,
    Seed,
    UserError,
    check,
)

RULE = "-" * 15  # between samples, as in nanoGPT
Checkpoint = Annotated[str, Pattern(r"best|latest|\d+", "best, latest, or a step")]


def main() -> None:
    """The console script."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print("usage: jaxgpt {" + ",".join(COMMANDS) + "} ...", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    run(COMMANDS[name], argv)


def run(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs a command and exits with its code: 2, after one line, for a mistake of the user's."""
    try:
        sys.exit(command(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read along has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(141)


def train(argv: list[str]) -> int:
    """[--config] FILE [--key=value ...]: trains."""
    config, on_cpu = from_command_line(argv, _start)
    from jaxgpt.train import train

    return train(config, on_cpu, cli_keys(argv))


def _start(keys: dict[str, Any]) -> bool:
    from jaxgpt.runtime import device, distributed

    names = ("coordinator", "num_processes", "process_id", "device")
    distributed.init_distributed(*(keys[name] for name in names))
    device.start(keys["device"], float64=keys["dtype"] == "float64")
    return not device.is_cpu()


@dataclass(frozen=True)
class SampleArgs:
    """Streams samples from a run directory, or from weights of a GPT-2."""

    init_from: InitFrom = "resume"
    """`resume` is the run; else weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder."""
    out_dir: NonEmptyStr = "out"
    """The run to sample from."""
    checkpoint: Checkpoint = "best"
    """Which of its checkpoints."""
    start: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The prompt; FILE:prompt.txt reads a file. Given several times, a batch. Default: \\n."""
    num_samples: PositiveInt = 10
    """Samples of each prompt."""
    max_new_tokens: PositiveInt = 500
    """TokenSplit of a sample."""
    temperature: NonNegativeFloat = 0.8
    """Below 1 is less random than the model; 0 takes the likeliest token."""
    top_k: NonNegativeInt = 200
    """Draw among so many of the likeliest tokens; 0 is all."""
    top_p: Annotated[float, Range(0, 1)] = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_p: Fraction = 0.0
    """Draw among tokens at least this probable beside the likeliest one."""
    repetition_penalty: Annotated[float, Range(1)] = 1.0
    """Above 1, makes tokens that were there before less likely."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End a sample before this text; may be given several times."""
    seed: Seed = 1337
    """Decides the samples."""
    context: Literal["halve", "exact"] = "halve"
    """Past block_size: go on from the last half, or slide token by token as nanoGPT does."""
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"
    """What to run on."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute type; `auto` is the run's. On a CPU bfloat16 is for weights: faster, text by text."""
    interactive: bool = False
    """Ask for prompts, one a line, until an empty one."""


def sample(argv: list[str]) -> None:
    """--out_dir=DIR | --init_from=WEIGHTS [--start=TEXT ...]: streams samples."""
    args = _parse(SampleArgs, argv, "sample.py")
    prompts = [_read_prompt(start) for start in args.start or ("\n",)]
    from jaxgpt.interop import huggingface
    from jaxgpt.runtime import device
    from jaxgpt.sample import Sampler
    from jaxgpt.sharding import local_mesh

    config, load, tokenizer = huggingface.load_trained(
        args.init_from, args.out_dir, args.checkpoint
    )
    dtype = config.dtype if args.dtype == "auto" else args.dtype
    device.start(args.device, float64="float64" in (config.dtype, dtype))
    params, step = load(local_mesh())
    resolved, _ = device.resolve_auto(config.replace(attention="auto", dropout=0.0, dtype=dtype))
    speak = partial(_speak, args, Sampler(resolved).load(params), tokenizer())
    whose = args.init_from if step is None else f"{args.out_dir}, step {step}"
    print(f"{whose}, {resolved.dtype}", file=sys.stderr)
    if args.interactive:
        while prompt := _ask():
            try:
                speak([prompt])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    else:
        speak(prompts)


def _ask() -> str:
    """A line of the user's, without its end; nothing where there are no more."""
    try:
        return input("> ")
    except EOFError:
        print()
        return ""


def _speak(args: SampleArgs, sampler, tokenizer, prompts: list[str]) -> None:
    """Prints every sample of every prompt: the first as it comes, the rest when they are done."""
    from jaxgpt.runtime.metrics import escape_controls
    from jaxgpt.sample import SamplingParams, sample_text

    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    texts, began = list(prompts), time.perf_counter()
    stream = sample_text(
        sampler,
        tokenizer,
        prompts,
        args.max_new_tokens,
        stop=args.stop,
        knobs=SamplingParams(
            **{f.name: getattr(args, f.name) for f in dataclasses.fields(SamplingParams)}
        ),
        seed=args.seed,
        context=args.context,
    )
    show = partial(escape_controls, on_terminal=sys.stdout.isatty())
    print(show(texts[0]), end="", flush=True)
    for pieces in stream:
        print(show(pieces[0]), end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    print(f"\n{RULE}", *(f"{show(text)}\n{RULE}" for text in texts[1:]), sep="\n")
    seconds = time.perf_counter() - began
    print(f"{sampler.num_generated / seconds:,.0f} tokens/s, compiling included", file=sys.stderr)


def _read_prompt(start: str) -> str:
    """`start` itself, or what the file says that it names, as in nanoGPT."""
    if not start.startswith("FILE:"):
        return start
    file = Path(start.removeprefix("FILE:"))
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"start={start!r}: {error}") from error


@dataclass(frozen=True)
class PrepareArgs:
    """Turns a text into token files: DATA_DIR/<name>/{train.bin,val.bin,meta.json,...}."""

    dataset: tyro.conf.Positional[NonEmptyStr]
    """A corpus that jaxgpt knows (shakespeare_char, shakespeare, shakespeare_plays,
    shakespeare_sonnets, openwebtext, fineweb_edu), a UTF-8 text file, a .jsonl of prompts and
    completions, or documents: a parquet file, or a folder of .parquet or .txt files."""
    tokenizer: str = ""
    """char, byte, gpt2, a tokenizer.json, or a corpus for its own. Default: the corpus's own; char
    for a file, gpt2 for documents."""
    data_dir: NonEmptyStr = "data"
    """Where datasets live."""
    val_share: Fraction = 0.0
    """Of documents: how many are for validation. 0 is 0.0005 of a corpus, 0.01 of your own."""
    shard: str = ""
    """Of documents: make every n-th piece, from the i-th on (i/n), so that machines share them."""
    processes: NonNegativeInt = 0
    """Of documents: how many tokenize side by side; 0 is one a core."""


def prepare(argv: list[str]) -> None:
    """DATASET-or-TEXT-FILE [--tokenizer=NAME]: writes token files."""
    args = _parse(PrepareArgs, argv, "jaxgpt prepare")
    from jaxgpt.data.prepare import prepare

    folder = prepare(**vars(args))
    if (meta := folder / "meta.json").exists():
        print(meta.read_text())
    print(folder)


@dataclass(frozen=True)
class EvalArgs:
    """How good a run, or a GPT-2, is: the loss of a whole validation split, or HellaSwag."""

    init_from: InitFrom = "resume"
    """`resume` is the run; else weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder."""
    task: Literal["loss", "hellaswag"] = "loss"
    """The loss of the validation split, or the share of HellaSwag's questions answered right."""
    dataset: str = ""
    """Whose validation split; empty is the run's own."""
    hellaswag_file: str = ""
    """HellaSwag's questions; empty is hellaswag/hellaswag_val.jsonl where datasets live."""
    out_dir: NonEmptyStr = "out"
    """The run to evaluate."""
    checkpoint: Checkpoint = "best"
    """Which of its checkpoints."""
    data_dir: str = ""
    """Where datasets live; empty is where the run found them, and data for weights."""
    mesh: str = ""
    """Devices by axis, as in training; empty is all of them on data."""
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"
    """What to run on."""


def evaluate(argv: list[str]) -> None:
    """--out_dir=DIR | --init_from=WEIGHTS [--task=NAME]: a whole split's loss, or HellaSwag."""
    args = _parse(EvalArgs, argv, "jaxgpt eval")
    from jaxgpt import evaluate
    from jaxgpt.runtime import device

    device.start(args.device)
    whose: dict[str, Any] = {"init_from": args.init_from, "mesh": args.mesh}
    whose |= {"data_dir": args.data_dir}
    if args.task == "hellaswag":
        found = evaluate.hellaswag(args.out_dir, args.checkpoint, args.hellaswag_file, **whose)
    else:
        found = evaluate.evaluate(args.out_dir, args.checkpoint, dataset=args.dataset, **whose)
    for name, value in found.items():
        print(f"{name}: {value}")


@dataclass(frozen=True)
class BenchArgs:
    """Times jaxgpt, alone or in turn with PyTorch nanoGPT."""

    what: Literal["train", "sample", "data", "attention"] = "train"
    """Whole training steps, sampling, batches alone, or the attention back ends alone."""
    config: str = ""
    """A config file to time, instead of a preset."""
    preset: Literal["", "cpu", "baby", "gpt2", "gpt2-xl"] = ""
    """nanoGPT's laptop recipe, its baby GPT, or GPT-2. Default: cpu on a CPU, else gpt2."""
    vs: str = ""
    """A checkout of PyTorch nanoGPT to take turns with (what=train and sample)."""
    torch_python: str = ""
    """A Python that has torch; empty is this one."""
    compile: Literal["both", "eager", "compiled"] = "both"
    """How nanoGPT runs: as it is, under torch.compile, or each in turn."""
    pairs: PositiveInt = 5
    """Turns of each side; also the samples taken of other things."""
    json: str = ""
    """Write everything measured, every sample too, to this file."""
    plot: str = ""
    """Picture of both sides' losses. Default: beside the JSON file, or bench.png."""


def bench(argv: list[str]) -> None:
    """[--preset=NAME | --config FILE] [--vs NANOGPT]: times training, sampling and their parts."""
    args = _parse(BenchArgs, argv, "jaxgpt bench")
    from jaxgpt.tools.bench.command import bench

    keys = dict(vars(args))
    bench(json_file=keys.pop("json"), **keys)


@dataclass(frozen=True)
class AblateArgs:
    """Trains a baseline and each feature of the menu, some seeds each, and compares them."""

    config: NonEmptyStr = "configs/ablate.py"
    """The baseline."""
    features: tuple[str, ...] = ()
    """Which of the menu; all of them if none is named."""
    seeds: PositiveInt = 5
    """Runs of each, with seeds 1, 2, ..."""
    out_dir: NonEmptyStr = "out/ablate"
    """Where runs are kept, and where menu.md, menu.png and menu.json go."""


def ablate(argv: list[str]) -> int:
    """[--config FILE] [--features NAME ...] [--seeds=N]: what each feature of the menu gains."""
    args = _parse(AblateArgs, argv, "jaxgpt ablate")
    variants = load(args.config)
    from jaxgpt.runtime import device
    from jaxgpt.tools.ablate import ablate

    device.start(variants["config"].device)
    config = variants.get("on_cpu" if device.is_cpu() else "config", variants["config"])
    return ablate(config, list(args.features), args.seeds, args.out_dir)


@dataclass(frozen=True)
class ExportArgs:
    """Writes a run as a folder that transformers loads as a GPT2LMHeadModel."""

    to: NonEmptyStr
    """The folder to make: config.json, model.safetensors and the tokenizer's files."""
    out_dir: NonEmptyStr = "out"
    """The run to export."""
    checkpoint: Checkpoint = "best"
    """Which of its checkpoints."""


def export(argv: list[str]) -> None:
    """--out_dir=DIR --to=FOLDER: writes a run as a folder that transformers loads."""
    args = _parse(ExportArgs, argv, "jaxgpt export")
    from jaxgpt.interop.export import export
    from jaxgpt.runtime import device

    device.start("cpu")  # it only copies
    step = export(args.out_dir, args.checkpoint, args.to)
    print(f"{args.to} holds step {step} of {args.out_dir}")


TOPOLOGY_HELP = """\
usage: jaxgpt plan --config FILE --topology=CHIP:SHAPE [--fit] [--key=value ...]

Compiles the run's training step for hardware that is not here, and says what it would need.
--topology  h100:8, h200:8x8 (machines x GPUs), v5e:4x4, v5p:4x4x4; also a100, b200, v6e
--fit       look for the least recomputation, then the largest batch_size, that fit
Every key of a config can be set too; train.py --help lists them."""


def plan(argv: list[str]) -> int:
    """--config FILE --topology=CHIP:SHAPE [--fit] [--key=value ...]: what a run would need."""
    if {"-h", "--help"} & set(argv):
        print(TOPOLOGY_HELP)
        return 0
    flags, topology, search = [], "", False
    rest = iter(argv)
    for flag in rest:
        name, _, value = flag.partition("=")
        if name == "--topology":
            topology = value or next(rest, "")
        elif flag == "--fit":
            search = True
        else:
            flags.append(flag)
    config, _ = from_command_line(flags, lambda keys: True)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxgpt.tools import plan

    fits = plan.run(config, topology, search, print)
    return 0 if fits else 1


def _parse(args_type: type, argv: list[str], prog: str):
    args = tyro.cli(args_type, args=argv, prog=prog, use_underscores=True)
    check(args)
    return args


COMMANDS = {
    "train": train,
    "sample": sample,
    "prepare": prepare,
    "eval": evaluate,
    "export": export,
    "bench": bench,
    "ablate": ablate,
    "plan": plan,
}
