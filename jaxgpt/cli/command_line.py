"""Parse a training command line: `[--config] FILE [--key=value ...]`."""

import ast
import inspect
import textwrap
from ast import AnnAssign, Constant, Expr, Name
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from itertools import pairwise
from typing import Annotated, Any

import tyro

from jaxgpt.config import Config, UserError, check_value, key_types
from jaxgpt.runtime.config_file import load_config_file

UNSUPPORTED = {"--compile": "jaxgpt always compiles", "--backend": "JAX brings its own collectives"}


@dataclass(frozen=True)
class CommandLine:
    """A config file with its two variants, and the keys that the command line sets."""

    config: Config
    cpu_config: Config | None
    overrides: dict[str, Any]
    config_file: str


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Parse a command line without importing JAX. Raises `UserError` for mistakes.

    Ends the process for `--help` (code 0) and for flags that do not parse (code 2).
    """
    config_file, flags = split_config_file(list(argv))
    for flag in flags:
        name = flag.split("=")[0]
        if name in UNSUPPORTED:
            raise UserError(f"{name}: {UNSUPPORTED[name]}; leave this flag out")
    configs = load_config_file(config_file) if config_file else {"config": Config()}
    overrides = _parse_flags(flags, configs["config"])
    if not config_file:
        raise UserError(
            "no config: name one, as in python train.py --config configs/shakespeare.py"
        )
    return CommandLine(configs["config"], configs.get("cpu_config"), overrides, config_file)


def split_config_file(argv: list[str]) -> tuple[str, list[str]]:
    """Split the config file, which comes first or after `--config`, from the other flags."""
    for i, arg in enumerate(argv):
        if arg.startswith("--config="):
            return arg.removeprefix("--config="), argv[:i] + argv[i + 1 :]
        if arg == "--config":
            if i + 1 == len(argv):
                raise UserError("--config: name a file, as in --config configs/shakespeare.py")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    return "", argv


def _parse_flags(flags: list[str], config: Config) -> dict[str, Any]:
    """Return the keys that the flags set; tyro checks types, prints help and suggests names."""
    values = config.to_dict()
    types = key_types(type(config))
    switches = {f"--{key}" for key, value in values.items() if isinstance(value, bool)}
    args = []
    for flag, following in pairwise([*flags, "--"]):
        is_alone = flag in switches and following.startswith("--")
        args.append(f"{flag}=True" if is_alone else flag)
    classes = dict.fromkeys((*Config.__bases__, *reversed(type(config).__mro__)))
    groups = [_key_group(keys_class, types, values) for keys_class in classes]
    parsed = tyro.cli(
        make_dataclass("Keys", [(g.__name__, g) for g in groups if g]),
        args=args,
        prog="train.py --config FILE",
        description="Trains the model that FILE describes. Every key can be set: --key=value.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        use_underscores=True,
    )
    names = {arg.split("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    parsed_keys = {k: value for group in vars(parsed).values() for k, value in vars(group).items()}
    given = [key for key in parsed_keys if f"__{key}" in names]
    return {key: check_value(key, parsed_keys[key], types[key]) for key in given}


def _key_group(group: type, types: dict[str, Any], values: dict[str, Any]) -> type | None:
    """Make a dataclass of a class's own keys, with their help and these defaults, if it has any."""
    inherited = {key for base in group.__mro__[1:] for key in inspect.get_annotations(base)}
    own = [key for key in inspect.get_annotations(group) if key in types and key not in inherited]
    if not own:
        return None
    help_texts, fields = _key_help(group), []
    for key in own:
        hint = Annotated[types[key], tyro.conf.arg(help=help_texts.get(key, ""))]
        fields.append((key, hint, values[key]))
    made = make_dataclass(group.__name__.removesuffix("Config").lower(), fields)
    made.__doc__ = group.__doc__
    return made


def _key_help(group: type) -> dict[str, str]:
    """Read the docstring under each key from the source of a config class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(group)))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = {}
    for field, text in pairwise(classes[0].body):
        match field, text:
            case AnnAssign(target=Name(id=key)), Expr(value=Constant(value=str(doc))):
                found[key] = " ".join(doc.split())
    return found


def choose_config(command_line: CommandLine) -> tuple[Config, list[str]]:
    """Start the processes and the device; return the config for that device, and log lines."""
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
