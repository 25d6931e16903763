"""Parse command lines: `[--config] FILE [--key=value ...]` for training, flags for other commands.

One parser serves all commands, so that mistakes are one-line errors; tyro prints `--help`.
"""

import ast
import difflib
import inspect
import os
import shutil
import textwrap
import typing
from ast import AnnAssign, Constant, Expr, Name
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, make_dataclass
from itertools import pairwise
from typing import Annotated, Any

import tyro

from jaxgpt.config import Config, UserError, check_value, key_types
from jaxgpt.runtime.config_file import load_config_file

COMMON_KEYS = (  # the first group of --help
    *("out_dir", "dataset", "max_iters", "batch_size", "block_size"),
    *("n_layer", "n_head", "n_embd", "dropout", "learning_rate"),
)
# nanoGPT's flags without a meaning here, and why.
UNSUPPORTED = {"compile": "jaxgpt always compiles", "backend": "JAX has collectives of its own"}
# Old names of flags, and old names of their values.
OLD_FLAGS = {
    "what": "benchmark", "pairs": "repeats", "vs": "compare_to", "fit": "search",
    "context": "overflow",
}  # fmt: skip
OLD_VALUES = {"context": {"halve": "truncate", "exact": "slide"}}


@dataclass(frozen=True)
class CommandLine:
    """A config file's `config` and `cpu_config`, and the keys that the flags set."""

    config: Config
    cpu_config: Config | None
    overrides: dict[str, Any]


def parse_command_line(argv: Sequence[str], other_flags: Iterable[str] = ()) -> CommandLine:
    """Parse a training command line without importing JAX; suggest `other_flags` too for a typo.

    Raises `UserError` for mistakes. Exits with code 0 after printing `--help`.
    """
    given, flags = take_flags(argv, {"config": str})
    if not given and flags and not flags[0].startswith("-"):
        given = {"config": flags.pop(0)}
    config_file = given.get("config", "")
    configs = load_config_file(config_file) if config_file else {"config": Config()}
    config = configs["config"]
    if asks_for_help(flags):
        print_key_help(config)
    types = key_types(type(config))
    overrides, others = take_flags(flags, types)
    reject_unknown(others, [*types, *other_flags])
    if not config_file:
        raise UserError("--config: missing; expected a file; try --config configs/shakespeare.py")
    return CommandLine(config, configs.get("cpu_config"), overrides)


def parse(args_type: type, argv: Sequence[str], prog: str) -> Any:
    """Parse a command's flags into its dataclass; see `parse_known`."""
    args, others = parse_known(args_type, argv, prog)
    reject_unknown(others, key_types(args_type))
    return args


def parse_known(args_type: type, argv: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """Parse the flags of a dataclass, and return an instance and the other arguments.

    A field without a default may be given without its name. Raises `UserError` for mistakes. Exits
    with code 0 after printing `--help`.
    """
    if asks_for_help(argv):
        print_help(args_type, prog)
    types = key_types(args_type)
    values, others = take_flags(argv, types)
    for field in fields(args_type):
        key = field.name
        if key in values or field.default is not MISSING:
            continue
        if others and others[0].startswith("-"):
            reject_unknown(others, types)
        if not others:
            raise UserError(f"--{key}: missing; expected --{key}=VALUE; try {prog} --help")
        values[key] = check_value(key, others.pop(0), types[key])
    return args_type(**values), others


# ---- flags -----------------------------------------------------------------------------------


def take_flags(argv: Sequence[str], types: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into the values of the flags in `types`, and the other arguments.

    A flag is --key=value, --key value, or --key alone for a bool. A tuple takes all arguments up
    to the next flag, and its flag may be repeated. Raises `UserError` for a missing or bad value.
    """
    values: dict[str, Any] = {}
    others, args = [], deque(argv)
    while args:
        arg = args.popleft()
        name, equals, text = arg.partition("=")
        given_key = name.removeprefix("--").replace("-", "_")
        key = given_key if given_key in types else OLD_FLAGS.get(given_key, "")
        if not arg.startswith("--") or key not in types:
            others.append(arg)
            continue
        kind = value_type(types[key])
        texts = [text] if equals else take_texts(args, kind)
        if not texts:
            raise UserError(f"--{key}: has no value; expected --{key}=VALUE")
        if typing.get_origin(kind) is tuple:
            values[key] = (*values.get(key, ()), *texts)
        else:
            text = OLD_VALUES.get(given_key, {}).get(texts[0], texts[0])
            values[key] = check_value(key, convert(text, kind), types[key])
    return values, others


def take_texts(args: deque[str], kind: Any) -> list[str]:
    """Remove a flag's values from the front of the arguments, and return them."""
    if kind is bool:
        return [args.popleft()] if args and args[0] in ("True", "False") else ["True"]
    most = len(args) if typing.get_origin(kind) is tuple else 1
    texts = []
    while args and len(texts) < most and not args[0].startswith("--"):
        texts.append(args.popleft())
    return texts


def value_type(hint: Any) -> Any:
    """Return a key's type without its annotations: int, float, bool, str, a Literal or a tuple."""
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def convert(text: str, kind: Any) -> Any:
    """Convert text to a type; return the text itself where it does not fit, for `check_value`."""
    if kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    choices = (True, False) if kind is bool else typing.get_args(kind)
    return {str(choice): choice for choice in choices}.get(text, text)


def reject_unknown(args: list[str], known: Iterable[str]) -> None:
    """Raise `UserError` if there are arguments, which are those that no flag took."""
    if not args:
        return
    flags = [arg for arg in args if arg.startswith("-")]
    if not flags:
        raise UserError(f"{args[0]}: unexpected argument; expected --key=value; try --help")
    name = flags[0].split("=")[0]
    key = name.lstrip("-").replace("-", "_")
    if key in UNSUPPORTED:
        raise UserError(f"{name}: {UNSUPPORTED[key]}; expected no such flag; try without {name}")
    nearest = difflib.get_close_matches(key, known, n=1) or ["help"]
    raise UserError(f"{name}: unknown key; try --{nearest[0]}")


# ---- help ------------------------------------------------------------------------------------


def asks_for_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def print_help(args_type: type, prog: str, description: str | None = None) -> None:
    """Print the help of a dataclass of flags, at most 80 columns wide, and exit."""
    os.environ["COLUMNS"] = str(min(80, shutil.get_terminal_size().columns))  # tyro reads it
    tyro.cli(
        args_type,
        args=["--help"],
        prog=prog,
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        use_underscores=True,
    )


def print_key_help(config: Config) -> None:
    """Print every key with this config's value: common keys first, then a group per class."""
    types, values = key_types(type(config)), config.to_dict()
    mro = type(config).__mro__[:-1]  # without `object`
    classes = dict.fromkeys((*Config.__bases__, *reversed(mro)))
    texts = {}
    for keys_class in classes:
        texts |= key_help(keys_class)

    def field(key: str) -> tuple[str, Any, Any]:
        return key, Annotated[types[key], tyro.conf.arg(help=texts.get(key, ""))], values[key]

    shown = set(COMMON_KEYS)
    groups: list[Any] = [field(key) for key in COMMON_KEYS]
    for keys_class in classes:
        own = inspect.get_annotations(keys_class).keys() & types.keys() - shown
        if own:
            name = keys_class.__name__.removesuffix("Config").lower()
            group = make_dataclass(name, [field(key) for key in types if key in own])
            group.__doc__ = keys_class.__doc__
            groups.append((name, group))
            shown |= own
    description = "Train the model that FILE describes. Set any key with --key=value."
    print_help(make_dataclass("Keys", groups, kw_only=True), "train.py --config FILE", description)


def key_help(keys_class: type) -> dict[str, str]:
    """Read the docstring under each key from the source of a config class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(keys_class)))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
    found = {}
    for field, text in pairwise(body):
        match field, text:
            case AnnAssign(target=Name(id=key)), Expr(value=Constant(value=str(doc))):
                found[key] = " ".join(doc.split())
    return found


# ---- the device ------------------------------------------------------------------------------


def choose_config(command_line: CommandLine) -> tuple[Config, list[str]]:
    """Start the processes and the device; return the config for the device, and log lines."""
    from jaxgpt.runtime import device, distributed

    overrides, cpu_config = command_line.overrides, command_line.cpu_config
    keys = command_line.config.to_dict() | overrides
    distributed.init_distributed(
        keys["coordinator"], keys["num_processes"], keys["process_id"], keys["device"]
    )
    device.start(keys["device"], float64=keys["dtype"] == "float64")
    if not device.is_cpu() or cpu_config is None or not keys["use_cpu_variant"]:
        return command_line.config.replace(**overrides), []
    config = cpu_config.replace(**overrides)
    changed = [f"{key}={v}" for key, v in config.to_dict().items() if keys.get(key) != v]
    return config, ["no accelerator, so cpu_config is used: " + ", ".join(changed)]
