"""Parse command lines: `[--config] FILE [--key=value ...]` to train, flags for other commands."""

import ast
import difflib
import inspect
import os
import shutil
import textwrap
import typing
from ast import AnnAssign, Constant, Expr, Name
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from io import StringIO
from itertools import pairwise
from typing import Annotated, Any

import tyro

from jaxgpt.config import Config, UserError, check, check_value, key_types
from jaxgpt.runtime.config_file import load_config_file

COMMON_KEYS = (  # the first group of --help
    *("out_dir", "dataset", "max_iters", "batch_size", "block_size"),
    *("n_layer", "n_head", "n_embd", "dropout", "learning_rate"),
)
# nanoGPT's flags without a meaning here, and why.
UNSUPPORTED = {"compile": "jaxgpt always compiles", "backend": "JAX has collectives of its own"}
SHELLS = "bash", "zsh"


@dataclass(frozen=True)
class CommandLine:
    """A config file's `config`, `cpu_config` and `baseline`, and the keys that the flags set."""

    config: Config
    cpu_config: Config | None
    baseline: Config | None  # of a study by `jaxgpt ablate`
    overrides: dict[str, Any]
    config_file: str


def parse_command_line(argv: Sequence[str], other_flags: Iterable[str] = ()) -> CommandLine:
    """Parse a training command line without importing JAX; suggest `other_flags` too for a typo.

    Raises `UserError` for mistakes. Exits with code 0 after printing `--help`.
    """
    config_file, flags = split_config_file(list(argv))
    configs = load_config_file(config_file) if config_file else {"config": Config()}
    config = configs["config"]
    types = key_types(type(config))
    description = "Train the model that FILE describes. Set any key with --key=value."
    groups, others = parse_flags(key_groups(config), flags, "train.py --config FILE", description)
    reject_unknown(others, [*types, *other_flags])
    if not config_file:
        raise UserError("--config: missing; expected a file or a name; try --config shakespeare")
    values = {}
    for name, value in vars(groups).items():
        values |= vars(value) if is_dataclass(value) else {name: value}
    given = [key for key in map(flag_key, flags) if key in types]
    overrides = {key: check_value(key, values[key], types[key]) for key in given}
    others = configs.get("cpu_config"), configs.get("baseline")
    return CommandLine(config, *others, overrides, config_file)


def split_config_file(argv: list[str]) -> tuple[str, list[str]]:
    """Split the config file, which comes first or after `--config`, from the other flags."""
    flags = join_values(argv)
    reject_repeated([flag for flag in flags if flag_key(flag) == "config"], {})
    for flag in flags:
        if flag == "--config":
            raise UserError("--config: has no value; expected --config=FILE")
        if flag.startswith("--config="):
            others = [other for other in flags if other is not flag]
            return flag.removeprefix("--config="), others
    if flags and not flags[0].startswith("-"):
        return flags[0], flags[1:]
    return "", flags


def parse(args_type: type, argv: Sequence[str], prog: str) -> Any:
    """Parse a command's flags into its dataclass, and check them.

    Raises `UserError` for mistakes. Exits with code 0 after printing `--help`.
    """
    args, others = parse_flags(args_type, argv, prog)
    reject_unknown(others, key_types(args_type))
    check(args)
    return args


# ---- flags -----------------------------------------------------------------------------------


def parse_flags(
    args_type: type, argv: Sequence[str], prog: str, description: str | None = None
) -> tuple[Any, list[str]]:
    """Let tyro parse flags or print `--help`; return the dataclass and the arguments left over.

    A flag of a bool may stand alone for True. Raises `UserError` where tyro would print an error of
    several lines.
    """
    types, args = flag_types(args_type), []
    reject_repeated(argv, types)
    for arg, following in pairwise([*argv, "--"]):
        is_bool = kind_of(types.get(flag_key(arg))) is bool and "=" not in arg
        is_alone = is_bool and following not in ("True", "False")
        args.append(f"{arg}=True" if is_alone else arg)
    try:
        with columns(min(80, shutil.get_terminal_size().columns)), redirect_stderr(StringIO()):
            return tyro.cli(
                args_type,
                args=args,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as end:
        if end.code == 0:
            raise
    required = [f.name for f in fields(args_type) if f.default is MISSING and f.name in types]
    subject = f"--{required[0]}: missing" if required else f"{prog}: a flag does not parse"
    raise flag_error(args, types) or UserError(f"{subject}; expected a value; try {prog} --help")


@contextmanager
def columns(count: int) -> Iterator[None]:
    """Let tyro see a terminal of this width."""
    given = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if given is not None:
            os.environ["COLUMNS"] = given


def flag_types(args_type: type) -> dict[str, Any]:
    """Return the annotation of each flag of a dataclass, whose fields may be groups of flags."""
    found = {}
    for key, hint in key_types(args_type).items():
        found |= flag_types(hint) if isinstance(hint, type) and is_dataclass(hint) else {key: hint}
    return found


def flag_error(argv: Sequence[str], types: dict[str, Any]) -> UserError | None:
    """Return the error for the first flag whose value does not parse."""
    for flag in join_values(argv):
        name, equals, text = flag.partition("=")
        key = flag_key(flag)
        if key not in types:
            continue
        if not equals:
            return UserError(f"{name}: has no value; expected {name}=VALUE")
        try:
            check_value(key, convert(text, types[key]), types[key])
        except UserError as error:
            return error
    return None


def reject_repeated(argv: Sequence[str], types: dict[str, Any]) -> None:
    """Raise `UserError` for a flag that is given twice, unless it may be repeated."""
    given: dict[str, list[str]] = {}
    for flag in join_values(argv):
        key, value = flag_key(flag), flag.partition("=")[2] or "True"
        may_repeat = tyro.conf.UseAppendAction in getattr(types.get(key), "__metadata__", ())
        if flag.startswith("--") and not may_repeat:
            given.setdefault(key, []).append(value)
    for key, values in given.items():
        takes_several = typing.get_origin(kind_of(types.get(key))) is tuple
        if len(values) > 1 and takes_several:
            problem = f"given {len(values)} times ({', '.join(values)}); expected it once"
            raise UserError(f"--{key}: {problem}; try --{key} {' '.join(values)}")
        if len(values) > 1:
            problem = f"given {len(values)} times ({', '.join(values)}); expected one value"
            raise UserError(f"--{key}: {problem}; try --{key}={values[-1]}")


def join_values(argv: Sequence[str]) -> list[str]:
    """Join each flag with the value that follows it: `--key value` becomes `--key=value`."""
    joined: list[str] = []
    for arg in argv:
        takes_value = joined and joined[-1].startswith("--") and joined[-1] != "--help"
        if takes_value and "=" not in joined[-1] and not arg.startswith("--"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def flag_key(flag: str) -> str:
    """Return the key of a flag: n_layer for --n_layer=4 and --n-layer=4."""
    return flag.partition("=")[0].removeprefix("--").replace("-", "_")


def kind_of(hint: Any) -> Any:
    """Return the type of a key without its annotations."""
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def convert(text: str, hint: Any) -> Any:
    """Convert text to the type of a key; return the text itself if it does not fit."""
    kind = kind_of(hint)
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
        subject = args[0] or "''"
        raise UserError(f"{subject}: unexpected argument; expected --key=value; try --help")
    name = flags[0].split("=")[0]
    key = flag_key(flags[0])
    if key in UNSUPPORTED:
        raise UserError(f"{name}: {UNSUPPORTED[key]}; expected no such flag; try without {name}")
    nearest = difflib.get_close_matches(key, known, n=1) or ["help"]
    raise UserError(f"{name}: unknown key; try --{nearest[0]}")


# ---- help ------------------------------------------------------------------------------------


def key_groups(config: Config) -> type:
    """Make a dataclass of all keys with this config's values: common keys, then a group per class.

    It is what `--help` shows.
    """
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
    return make_dataclass("Keys", groups, kw_only=True, frozen=True)


def print_completion(commands: dict[str, type], shell: str) -> None:
    """Print the script by which a shell completes `jaxgpt` with these commands and their flags.

    Raises `UserError` for an unknown shell.
    """
    if shell not in SHELLS:
        subject = f"--tyro-print-completion={shell!r}"
        raise UserError(f"{subject}: unknown shell; expected one of {', '.join(SHELLS)}")
    flags = [Annotated[c, tyro.conf.subcommand(name)] for name, c in commands.items()]
    one_of: Any = typing.Union[tuple(flags)]  # noqa: UP007, the members are not fixed
    script = StringIO()
    with redirect_stdout(script), suppress(SystemExit):
        tyro.cli(
            one_of,
            args=["--tyro-print-completion", shell],
            prog="jaxgpt",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            use_underscores=True,
        )
    # where there is nothing to complete, bash then completes file names
    print(script.getvalue().replace("\ncomplete -F", "\ncomplete -o default -F"))


def with_keys(args_type: type) -> type:
    """Return a dataclass of a command's flags and of every key, for commands that take both."""
    bases = args_type, key_groups(Config())
    return make_dataclass(args_type.__name__, [], bases=bases, frozen=True)


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
    device.enable_float64(config)
    changed = [f"{key}={v}" for key, v in config.to_dict().items() if keys.get(key) != v]
    reason = "no accelerator" if keys["device"] == "auto" else f"device={keys['device']}"
    return config, [f"{reason}, so cpu_config is used: " + ", ".join(changed)]
