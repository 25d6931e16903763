"""The commands: `jaxgpt <command>`, train.py and sample.py.

JAX is imported after the command line is parsed, so that help and errors are printed at once. The
comment at each field of a dataclass of arguments is the field's --help.
"""

import dataclasses
import io
import math
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
from jaxgpt.cli.command_line import (
    choose_config,
    parse,
    parse_command_line,
    parse_flags,
    print_completion,
    with_keys,
)
from jaxgpt.config import UserError
from jaxgpt.runtime.files import (
    DISK_ERRORS,
    PATH_ERRORS,
    folder_error,
    is_url,
    reason,
    reject_url,
)
from jaxgpt.tools.bench.options import BenchArgs

COMPLETION = "--tyro-print-completion"
SEPARATOR = "-" * 15  # between samples, as in nanoGPT
DatasetName = Annotated[
    str, keys.Pattern(rf"({keys.DATASET_NAME.pattern})?", "a name for a folder")
]


def main() -> None:
    """Run the console script: `jaxgpt COMMAND ...`."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"jaxgpt {__version__}")
    elif name in ("-h", "--help"):
        print("usage: jaxgpt COMMAND ...\n")
        for known, command in COMMANDS.items():
            print(f"  {known:<8} {command.__doc__}")
        print("\nTry jaxgpt COMMAND --help, and jaxgpt train shakespeare --help.")
    else:
        with exit_on_error():
            if COMPLETION in sys.argv:
                shells = sys.argv[sys.argv.index(COMPLETION) + 1 :]
                print_completion(flags_of_commands(), shells[0] if shells else "")
                return
            if name not in COMMANDS:
                expected = f"expected one of {', '.join(COMMANDS)}"
                raise UserError(f"{name}: unknown command; {expected}; try jaxgpt --help")
            sys.exit(COMMANDS[name](argv))


def run(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run a command with these arguments, by default the process's, and exit with its code."""
    with exit_on_error():
        sys.exit(command(sys.argv[1:] if argv is None else argv))


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a `UserError` as one line and exit with 2; exit quietly on Ctrl-C or a closed pipe.

    The codes are 130 for Ctrl-C and 141 for a pipe whose reader has exited, as `head` does.
    """
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and stdout.errors == "strict":
        stdout.reconfigure(errors="backslashreplace")  # for a character that its encoding lacks
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout at exit, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in PATH_ERRORS or error.filename is None:
            raise
        expected = "expected a path that this command can use"
        print(f"error: {error.filename}: {reason(error)}; {expected}", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class TrainArgs:
    """Train the model of a config file. Its keys follow as flags."""

    config: str = ""  # Config file, or the name of one that comes with jaxgpt.


def train(argv: list[str]) -> int:
    """Train the model of a config file."""
    command_line = parse_command_line(argv)
    config, notes = choose_config(command_line)
    from jaxgpt.train import train

    code = train(config, cli_keys=frozenset(command_line.overrides), notes=notes)
    if config.report:
        from jaxgpt import api

        if api.has_to_report(config, code):
            print_report(config.out_dir, api.load(config.out_dir, config=type(config)).report())
    return code


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """Which run or weights a command reads."""

    out_dir: keys.NonEmptyStr = "out"  # Run directory.
    config: str = ""  # Config file of the run; needed only if the file defines a config class.
    checkpoint: keys.Checkpoint = "best"  # Checkpoint of the run: best, latest, or a step.
    # `resume` loads the run. Otherwise the weights to load: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # a folder, or nanoGPT's ckpt.pt.
    init_from: keys.InitFrom = "resume"


@dataclass(frozen=True, kw_only=True)
class ModelArgs(RunArgs):
    """Which model a command loads, and on which device."""

    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"  # Device to run on.


@dataclass(frozen=True, kw_only=True)
class SampleArgs(ModelArgs):
    """Stream samples from a run directory or from GPT-2 weights."""

    # Prompt, or FILE:prompt.txt to read it from a file. Several prompts make a batch. Without a
    # prompt, samples start from a line break.
    start: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    num_samples: keys.PositiveInt = 10  # Number of samples per prompt.
    max_new_tokens: keys.PositiveInt = 500  # Number of tokens per sample.
    # Values below 1 make samples less random; 0 always takes the most likely token.
    temperature: keys.NonNegativeFloat = 0.8
    top_k: keys.NonNegativeInt = 200  # Sample from the top_k most likely tokens; 0 means all.
    # Sample from the most likely tokens that together have this probability.
    top_p: Annotated[float, keys.Range(0, 1)] = 1.0
    # Sample from tokens with at least this fraction of the top token's probability.
    min_p: keys.Fraction = 0.0
    # Values above 1 make tokens that already occurred less likely.
    repetition_penalty: Annotated[float, keys.Range(1)] = 1.0
    # End a sample before this text. The flag may be repeated.
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    seed: keys.Seed = 1337  # Seed of the samples.
    # Past block_size, continue from the last half of the context (truncate), or move the context by
    # one token per step as nanoGPT does, which is slower (slide).
    overflow: Literal["truncate", "slide"] = "truncate"
    # Compute dtype; auto takes the device's. On a CPU, bfloat16 stores only the weights in
    # bfloat16, which is faster.
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    interactive: bool = False  # Read prompts, one per line, until an empty line.
    show_working: bool = False  # Print the working of a problem of arithmetic, and its answer.
    # Decode calls to trace after the samples, into OUT_DIR/profile/sample; 0 traces none.
    profile: keys.NonNegativeInt = 0


def sample(argv: list[str]) -> None:
    """Stream samples from a run or from GPT-2 weights."""
    args = parse(SampleArgs, argv, "sample.py")
    if args.profile:
        reject_url("out_dir", args.out_dir)
    if args.interactive and args.start:
        raise UserError("start: --interactive asks for prompts; expected only one of the two flags")
    reject_flags_of_runs(args)
    prompts = [read_start(start) for start in args.start or ("\n",)]
    from jaxgpt.api import Run
    from jaxgpt.data.tokenizer import with_working
    from jaxgpt.interop.trained import open_trained
    from jaxgpt.runtime.device import explain_out_of_memory

    is_run = args.init_from == "resume"
    trained = open_trained(args.init_from, args.out_dir, args.checkpoint, config=args.config)
    run = Run(trained, args.out_dir if is_run else args.init_from, args.device, args.dtype)
    tokenizer = run.tokenizer  # before the weights, which take longer to load
    if args.show_working:
        tokenizer = with_working(tokenizer)
    advice = "try a smaller --num_samples, --dtype=bfloat16 or a smaller model"
    with explain_out_of_memory(f"num_samples={args.num_samples}", "sampling", advice):
        sampler = run.sampler
        step = f", step {run.step}" if is_run else ""
        print(f"{run.source}{step}, {run.inference_config.dtype}", file=sys.stderr)
        if args.interactive:
            answer_prompts(args, sampler, tokenizer)
        else:
            print_samples(args, sampler, tokenizer, prompts)


def reject_unused(args: Any, flag: str, problem: str, advice: str) -> None:
    """Raise `UserError` if a flag is given that does not apply."""
    value = getattr(args, flag)
    if value != getattr(type(args), flag):
        raise UserError(f"{flag}={value!r}: {problem}; try {advice}, or without --{flag}")


def reject_flags_of_runs(args: RunArgs) -> None:
    """Raise `UserError` for flags that choose a part of a run, if weights are loaded."""
    if args.init_from != "resume":
        reject_unused(args, "checkpoint", "only a run has checkpoints", "--init_from=resume")
        reject_unused(args, "config", "only a run has a config file", "--init_from=resume")


def answer_prompts(args: SampleArgs, sampler: Any, tokenizer: Any) -> None:
    """Print samples of each prompt that the user types, until an empty line."""
    try:
        while prompt := input("> "):
            try:
                print_samples(args, sampler, tokenizer, [prompt])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    except EOFError:
        print()
    except UnicodeDecodeError as error:
        raise UserError(f"prompt: {reason(error)}; expected text in UTF-8") from error


def read_start(start: str) -> str:
    """Return the prompt: `start` itself, or the text of the file that FILE:name names.

    Raises `UserError` for a file that cannot be read or is not UTF-8.
    """
    if not start.startswith("FILE:"):
        return start
    file = Path(start.removeprefix("FILE:"))
    try:
        return file.read_bytes().decode("utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"start={start!r}: {reason(error)}; expected a UTF-8 text file") from error


def print_samples(args: SampleArgs, sampler: Any, tokenizer: Any, prompts: list[str]) -> None:
    """Stream the first sample to stdout, then print the other samples of every prompt.

    `sampler` is a `Sampler` with parameters. Raises `UserError` for a prompt that has no tokens.
    """
    from jaxgpt.data.text_stream import generate_text
    from jaxgpt.runtime.metrics import escape_controls
    from jaxgpt.sample import SamplingParams

    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    sampling = SamplingParams(**{name: getattr(args, name) for name in names})
    show = partial(escape_controls, on_terminal=sys.stdout.isatty())
    texts, began = list(prompts), time.perf_counter()
    options: dict[str, Any] = {name: getattr(args, name) for name in ("stop", "seed", "overflow")}
    options["sampling"] = sampling
    stream = generate_text(sampler, tokenizer, prompts, args.max_new_tokens, **options)
    print(show(texts[0]), end="", flush=True)  # after generate_text has accepted the prompts
    for pieces in stream:
        print(show(pieces[0]), end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    print(f"\n{SEPARATOR}")
    for text in texts[1:]:
        print(f"{show(text)}\n{SEPARATOR}")
    seconds = time.perf_counter() - began
    rate = sampler.num_generated / seconds
    print(f"{rate:,.0f} tokens/s, compilation included", file=sys.stderr)
    if args.profile:
        del options["stop"]  # every traced call decodes a whole chunk
        profile_decoding(args, sampler, list(map(tokenizer.encode, prompts)), options)


def profile_decoding(
    args: SampleArgs, sampler: Any, prompts: list[Any], options: dict[str, Any]
) -> None:
    """Generate the beginning of the samples again, traced, and print what took the time.

    The samples have compiled the programs, so the trace has no compilation.
    """
    from jaxgpt.runtime.profile import FOLDER, VIEWER, profile_calls
    from jaxgpt.sample import CHUNK

    calls = min(args.profile, math.ceil(args.max_new_tokens / CHUNK))
    generate = partial(sampler.generate, prompts, max_new_tokens=calls * CHUNK, **options)
    folder = Path(args.out_dir, FOLDER, "sample")
    table, trace = profile_calls(folder, lambda: list(generate()), calls)
    print(f"profile of {calls} decode calls of {CHUNK} tokens: {table}", file=sys.stderr)
    print(f"open {trace} at {VIEWER} to see every operation of the profile", file=sys.stderr)


@dataclass(frozen=True)
class PrepareArgs:
    """Turn text into token files: DATA_DIR/NAME/train.bin, val.bin and meta.json."""

    # Known corpus (shakespeare_char, shakespeare, shakespeare_plays, shakespeare_sonnets,
    # openwebtext, fineweb_edu or fineweb10B), a UTF-8 text file, a .jsonl file of prompts and
    # completions, a parquet file, or a folder of .parquet or .txt files. The last two are sets of
    # documents, as are openwebtext and fineweb_edu. fineweb10B is downloaded as token files.
    dataset: tyro.conf.Positional[keys.NonEmptyStr]
    # char, byte, gpt2, the path of a tokenizer.json, or a corpus whose tokenizer to use. Empty
    # means the corpus's own tokenizer, char for a file, and gpt2 for documents.
    tokenizer: str = ""
    data_dir: keys.NonEmptyStr = "data"  # Folder of all datasets.
    name: DatasetName = ""  # NAME, and value of --dataset in training; empty means the source's.
    overwrite: bool = False  # Replace a dataset of another text or tokenizer.
    # Documents only: fraction of documents for validation. 0 means 0.0005 for a corpus and 0.01 for
    # your own documents.
    val_share: keys.Fraction = 0.0
    # Documents only: i/n, with i from 0 to n - 1, prepares the pieces i, i + n, i + 2n and so on,
    # to divide the work among machines.
    shard: str = ""
    # Documents only: number of processes that tokenize; 0 means one per core.
    processes: keys.NonNegativeInt = 0
    # fineweb10B only: number of training shards to download, each of 100M tokens; 0 means all 103.
    # Shards that are there already are kept.
    shards: keys.NonNegativeInt = 0


def prepare(argv: list[str]) -> None:
    """Turn text into token files."""
    args = parse(PrepareArgs, argv, "jaxgpt prepare")
    reject_url("data_dir", args.data_dir)
    from jaxgpt.data.prepare import prepare

    try:
        folder = prepare(**vars(args))
    except OSError as error:
        is_source = Path(str(error.filename)).is_relative_to(args.dataset)
        if error.errno not in DISK_ERRORS or (isinstance(error, PermissionError) and is_source):
            raise
        raise folder_error(f"data_dir={args.data_dir!r}", "--data_dir", error) from error
    meta = folder / "meta.json"
    if meta.exists():
        print(meta.read_text())
    print(folder)


@dataclass(frozen=True, kw_only=True)
class EvalArgs(ModelArgs):
    """Evaluate a run or GPT-2 weights on a validation split or on HellaSwag."""

    # Compute the loss on the whole validation split, or the accuracy on HellaSwag.
    task: Literal["loss", "hellaswag"] = "loss"
    dataset: str = ""  # Dataset of the validation split; empty means the run's.
    # File of HellaSwag questions; empty means DATA_DIR/hellaswag/hellaswag_val.jsonl.
    hellaswag_file: str = ""
    data_dir: str = ""  # Folder of all datasets; empty means the run's, or data for weights.
    mesh: str = ""  # Devices per axis, as in training; empty puts all devices on data.


def evaluate(argv: list[str]) -> None:
    """Print a model's validation loss, or its accuracy on HellaSwag."""
    args = parse(EvalArgs, argv, "jaxgpt eval")
    if args.task == "hellaswag":
        reject_unused(args, "dataset", "HellaSwag has its own questions", "--task=loss")
    else:
        reject_unused(args, "hellaswag_file", "the loss needs no questions", "--task=hellaswag")
    reject_flags_of_runs(args)
    from jaxgpt.runtime import device
    from jaxgpt.tools.evaluation import evaluate
    from jaxgpt.tools.hellaswag import hellaswag

    device.start(args.device)
    model = args.out_dir, args.checkpoint, args.data_dir, args.config
    options = {"init_from": args.init_from, "mesh": args.mesh}
    advice = "try several devices, or a smaller model"
    with device.explain_out_of_memory(f"mesh={args.mesh!r}", "the evaluation", advice):
        if args.task == "hellaswag":
            result = hellaswag(*model, file=args.hellaswag_file, **options)
        else:
            result = evaluate(*model, dataset=args.dataset, **options)
    for name, value in result.items():
        print(f"{name}: {value}")


@dataclass(frozen=True, kw_only=True)
class ExportArgs(RunArgs):
    """Write a run or weights as a folder that transformers loads as a GPT2LMHeadModel."""

    # Folder to write: config.json, model.safetensors and the tokenizer's files.
    to: keys.NonEmptyStr


def export(argv: list[str]) -> None:
    """Write a run or weights as a folder that transformers loads."""
    args = parse(ExportArgs, argv, "jaxgpt export")
    reject_flags_of_runs(args)
    reject_url("to", args.to)
    from jaxgpt.interop.export import export
    from jaxgpt.runtime import device

    device.start("cpu")  # export only copies arrays
    step = export(args.out_dir, args.checkpoint, args.to, args.config, args.init_from)
    source = args.init_from if step is None else f"step {step} of {args.out_dir}"
    print(f"wrote {source} to {args.to}")


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Write a page with the curves and configs of runs, and views of a model."""

    # Run directories, or weights. The page compares them, and shows the model of the first.
    runs: tyro.conf.Positional[tuple[str, ...]]
    prompt: str = ""  # Text for which to show attention; empty means validation text.
    to: str = ""  # File to write; empty means report.html in the first run directory.
    config: str = ""  # Config file of the runs; needed only if it defines a config class.
    checkpoint: keys.Checkpoint = "best"  # Checkpoint of the runs: best, latest, or a step.


def report(argv: list[str]) -> None:
    """Write a page that shows what a run did, and what its model does."""
    args = parse(ReportArgs, argv, "jaxgpt report")
    if not args.runs:
        raise UserError(
            "report: no run; expected run directories; try jaxgpt report out/shakespeare"
        )
    from jaxgpt import api
    from jaxgpt.runtime import run_dir
    from jaxgpt.tools.report import write_report

    flags_of_runs = {"checkpoint": args.checkpoint, "config": args.config}
    has_run = any(map(run_dir.is_run, args.runs))
    runs = []
    for source in args.runs:
        is_compared_with_a_run = has_run and not run_dir.is_run(source)
        runs.append(api.load(source, **{} if is_compared_with_a_run else flags_of_runs))
    path = write_report(runs, args.prompt, args.to)
    print_report("" if args.to else args.runs[0], path)


def print_report(source: str, path: Path) -> None:
    """Print the path of a report, or its URL if it was uploaded to the run in a bucket."""
    print(f"{source.rstrip('/')}/{path.name}" if is_url(source) else path)


def bench(argv: list[str]) -> None:
    """Time training or sampling, alone or against PyTorch nanoGPT."""
    args = parse(BenchArgs, argv, "jaxgpt bench")
    if args.suite:
        from jaxgpt.tools.bench.suite import run_suite

        run_suite(args)
    else:
        from jaxgpt.tools.bench.command import bench

        bench(args)


@dataclass(frozen=True)
class AblateArgs:
    """Train a baseline and each feature with several seeds, and compare the losses.

    Keys of the config follow as flags, except init_from, seed and report.
    """

    config: keys.NonEmptyStr = "ablate"  # Config file of the baseline, or its name.
    features: tuple[str, ...] = ()  # Features to compare; none means all of them.
    seeds: keys.PositiveInt = 5  # Number of runs per feature; their seeds are 1, 2, ...
    # Folder of the runs and of the results; empty means the out_dir of the config file.
    out_dir: str = ""


def ablate(argv: list[str]) -> int:
    """Train a baseline and each feature of the menu, and compare them."""
    args, flags = parse_flags(AblateArgs, argv, "jaxgpt ablate")
    keys.check(args)
    command_line = parse_command_line([f"--config={args.config}", *flags], other_flags=vars(args))
    overrides = command_line.overrides
    for key in overrides.keys() & {"init_from", "seed", "report"}:
        problem = f"the runs of a study have their own; try without --{key}"
        raise UserError(f"{key}={overrides[key]!r}: {problem}")
    config, notes = choose_config(command_line)
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    from jaxgpt.tools import ablate, time_to_loss

    out_dir = args.out_dir or config.out_dir
    reject_url("out_dir", out_dir)
    if command_line.baseline:
        baseline = command_line.baseline.replace(**overrides)
        return time_to_loss.measure(baseline, config, args.features, args.seeds, out_dir)
    return ablate.ablate(config, list(args.features), args.seeds, out_dir)


@dataclass(frozen=True)
class PlanArgs:
    """Compile a training step for absent hardware, and print what it needs.

    FILE and its keys follow, as for training: --config FILE [--key=value ...].
    """

    # Chip and shape: h100:8, h200:8x8 (machines x GPUs), v5e:4x4 or v5p:4x4x4. Other chips are
    # a100, b200 and v6e.
    topology: str = ""
    # Find the least recomputation that fits, and then the largest batch_size.
    search: bool = False
    breakdown: bool = False  # Also print a table of the step's kernels by kind.
    # Also compile the step without each of its variants for this hardware, and print the gains.
    levers: bool = False


def plan(argv: list[str]) -> int:
    """Print what a training step would need on absent hardware."""
    args, flags = parse_flags(PlanArgs, argv, "jaxgpt plan --config FILE")
    command_line = parse_command_line(flags, other_flags=vars(args))
    config = command_line.config.replace(**command_line.overrides)
    reject_url("data_dir", config.data_dir)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxgpt.runtime import device
    from jaxgpt.tools import plan

    device.enable_float64(config)

    options = args.search, print, args.breakdown, args.levers
    return 0 if plan.run(config, args.topology, *options) else 1


COMMANDS = {
    "train": train, "sample": sample, "prepare": prepare, "eval": evaluate,
    "report": report, "export": export, "bench": bench, "ablate": ablate, "plan": plan,
}  # fmt: skip


def flags_of_commands() -> dict[str, type]:
    """Return, by command, the dataclass of its flags, which shells complete."""
    keyed = {"train": TrainArgs, "ablate": AblateArgs, "plan": PlanArgs}
    others = {"sample": SampleArgs, "prepare": PrepareArgs, "eval": EvalArgs}
    others |= {"export": ExportArgs, "report": ReportArgs}
    keyed = {name: with_keys(args_type) for name, args_type in keyed.items()}
    return keyed | others | {"bench": BenchArgs}
