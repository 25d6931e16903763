"""`jaxgpt <command>`, and what train.py and sample.py call.

Imports of JAX wait until a command line has been read: help and mistakes are answered at once.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.command_line import from_command_line
from jaxgpt.config import (
    Count,
    CountOrOff,
    Folder,
    Number,
    Seed,
    Share,
    Size,
    Text,
    UserError,
    check,
)

RULE = "-" * 15  # between samples, as in nanoGPT
Checkpoint = Annotated[str, Text(r"best|latest|\d+", "best, latest, or a step")]


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


def train(argv: list[str]) -> int:
    """[--config] FILE [--key=value ...]: trains."""
    config, on_cpu = from_command_line(argv, _start)
    from jaxgpt.train import train

    return train(config, on_cpu)


def _start(name: str, dtype: str) -> bool:
    from jaxgpt import device

    device.start(name, float64=dtype == "float64")
    return not device.on_cpu()


@dataclass(frozen=True)
class SampleArgs:
    """Streams samples from a run directory."""

    out_dir: Folder = "out"
    """The run to sample from."""
    checkpoint: Checkpoint = "best"
    """Which of its checkpoints."""
    start: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The prompt; FILE:prompt.txt reads a file. Given several times, a batch. Default: \\n."""
    num_samples: Count = 10
    """Samples of each prompt."""
    max_new_tokens: Count = 500
    """Tokens of a sample."""
    temperature: Size = 0.8
    """Below 1 is less random than the model; 0 takes the likeliest token."""
    top_k: CountOrOff = 200
    """Draw among so many of the likeliest tokens; 0 is all."""
    top_p: Annotated[float, Number(0, 1)] = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Draw among tokens at least this probable beside the likeliest one."""
    repetition_penalty: Annotated[float, Number(1)] = 1.0
    """Above 1, makes tokens that were there before less likely."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End a sample before this text; may be given several times."""
    seed: Seed = 1337
    """Decides the samples."""
    context: Literal["halve", "exact"] = "halve"
    """Past block_size: go on from the last half, or slide token by token as nanoGPT does."""
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"
    """What to run on."""
    interactive: bool = False
    """Ask for prompts, one a line, until an empty one."""


def sample(argv: list[str]) -> None:
    """--out_dir=DIR [--start=TEXT ...]: streams samples."""
    args = _parse(SampleArgs, argv, "sample.py")
    prompts = [_read_prompt(start) for start in args.start or ("\n",)]
    from jaxgpt import device, run_dir
    from jaxgpt.data.tokenizer import FILE, load
    from jaxgpt.sample import Sampler
    from jaxgpt.sharding import one_device

    config = run_dir.load_config(args.out_dir)
    device.start(args.device, float64=config.dtype == "float64")
    params, step = run_dir.load_params(config, args.checkpoint, one_device())
    resolved, _ = device.resolve(config.replace(attention="auto", dropout=0.0))
    speak = partial(_speak, args, Sampler(resolved).load(params), load(Path(args.out_dir, FILE)))
    print(f"{args.out_dir}, step {step}, {resolved.dtype}", file=sys.stderr)
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
    from jaxgpt.sample import Knobs, sample_text

    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    texts, began = list(prompts), time.perf_counter()
    stream = sample_text(
        sampler,
        tokenizer,
        prompts,
        args.max_new_tokens,
        stop=args.stop,
        knobs=Knobs(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Knobs)}),
        seed=args.seed,
        context=args.context,
    )
    print(_printable(texts[0]), end="", flush=True)
    for pieces in stream:
        print(_printable(pieces[0]), end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    print(f"\n{RULE}", *(f"{_printable(text)}\n{RULE}" for text in texts[1:]), sep="\n")
    seconds = time.perf_counter() - began
    print(f"{sampler.drawn / seconds:,.0f} tokens/s, compiling included", file=sys.stderr)


def _read_prompt(start: str) -> str:
    """`start` itself, or what the file says that it names, as in nanoGPT."""
    if not start.startswith("FILE:"):
        return start
    file = Path(start.removeprefix("FILE:"))
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"start={start!r}: {error}") from error


def _printable(text: str) -> str:
    """Text for a terminal: control characters, which could steer it, are spelled out."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class PrepareArgs:
    """Turns a text into token files: DATA_DIR/<name>/{train.bin,val.bin,meta.json,...}."""

    dataset: tyro.conf.Positional[Folder]
    """A corpus that jaxgpt knows (shakespeare_char, shakespeare), or a UTF-8 text file."""
    tokenizer: str = ""
    """char, byte, gpt2, or a tokenizer.json. Default: the corpus's own; char for a file."""
    data_dir: Folder = "data"
    """Where datasets live."""


def prepare(argv: list[str]) -> None:
    """DATASET-or-TEXT-FILE [--tokenizer=NAME]: writes token files."""
    args = _parse(PrepareArgs, argv, "jaxgpt prepare")
    from jaxgpt.data.prepare import prepare

    folder = prepare(args.dataset, args.data_dir, args.tokenizer)
    print((folder / "meta.json").read_text())
    print(folder)


@dataclass(frozen=True)
class EvalArgs:
    """The loss of a run over its whole validation split."""

    out_dir: Folder = "out"
    """The run to evaluate."""
    checkpoint: Checkpoint = "best"
    """Which of its checkpoints."""
    data_dir: str = ""
    """Where datasets live; empty is where the run found them."""
    mesh: str = ""
    """Devices by axis, as in training; empty is all of them on data."""
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"
    """What to run on."""


def evaluate(argv: list[str]) -> None:
    """--out_dir=DIR: the loss of the whole validation split."""
    args = _parse(EvalArgs, argv, "jaxgpt eval")
    from jaxgpt import device
    from jaxgpt.evaluate import evaluate

    device.start(args.device)
    for name, value in evaluate(args.out_dir, args.checkpoint, args.data_dir, args.mesh).items():
        print(f"{name}: {value}")


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
    config, _ = from_command_line(flags, lambda device, dtype: True)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxgpt import plan

    fits = plan.run(config, topology, search, print)
    return 0 if fits else 1


def _parse(args_type: type, argv: list[str], prog: str):
    args = tyro.cli(args_type, args=argv, prog=prog, use_underscores=True)
    check(args)
    return args


COMMANDS = {"train": train, "sample": sample, "prepare": prepare, "eval": evaluate, "plan": plan}
