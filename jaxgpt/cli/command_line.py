"""A config file and a command line -> Config."""

import dataclasses
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxgpt.config import GROUPS, Config, UserError, build, check


def load(path: str) -> dict[str, Config]:
    """Runs a config file, and returns its `config` and, if there is one, its `on_cpu`.

    Config files are the user's own Python and run as such. Raises `UserError` with the line of
    the file that is to blame.
    """
    if not Path(path).is_file():
        there = ", ".join(str(p) for p in sorted(Path("configs").rglob("*.py")))
        raise UserError(
            f"--config {path}: no such file" + (f"; there are {there}" if there else "")
        )
    try:
        names = runpy.run_path(path)
    except Exception as error:
        raise UserError(_blame(path, error)) from error
    variants = {k: names[k] for k in ("config", "on_cpu") if k in names}
    for name, value in ({"config": None} | variants).items():
        if not isinstance(value, Config):
            raise UserError(f"--config {path}: must build `{name} = Config(...)`")
    return variants


def _blame(path: str, error: Exception) -> str:
    """One line for an error in a config file: where, the user's own line, and what is wrong."""
    if isinstance(error, SyntaxError) and error.lineno:
        line = (error.text or "").strip()
        return f"{error.filename or path}, line {error.lineno}: {line!r}: {error.msg}"
    said = [str(error)] if isinstance(error, UserError) else traceback.format_exception_only(error)
    message = " ".join("".join(said).split())
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", message):
        try:
            build({unknown[1]: None})
        except UserError as named:
            message = str(named)
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if not frames:
        return f"{path}: {message}"
    first, last = frames[-1].lineno or 1, frames[-1].end_lineno or 1
    key = re.match(r"\w+", message)
    named = [n for n in range(first, last + 1) if key and re.search(rf"\b{key[0]}\b", lines[n - 1])]
    line = named[0] if named else first
    return f"{path}, line {line}: {lines[line - 1].strip()!r}: {message}"


NOT_KEYS = {
    "compile": "jaxgpt always compiles",
    "backend": "JAX brings its own collectives",
}


def from_command_line(
    argv: Sequence[str], has_accelerator: Callable[[dict[str, Any]], bool]
) -> tuple[Config, dict[str, Any]]:
    """`[--config] FILE [--key=value ...]` -> the config, and the keys its `on_cpu` has changed.

    `has_accelerator` starts JAX as the keys say, and tells whether an accelerator will run it.
    Ends the process for `--help` (code 0) and for flags that do not parse (code 2);
    raises `UserError` for what else is wrong.
    """
    path, flags = _split_config_path(list(argv))
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0]
        if flag.startswith("--") and name in NOT_KEYS:
            raise UserError(f"--{name}: {NOT_KEYS[name]}; leave this flag out")
    variants = load(path) if path else {"config": Config()}
    keys = _parse_flags(flags, variants["config"])
    if not path:
        raise UserError(
            "no config: name one, as in python train.py --config configs/shakespeare.py"
        )
    accelerated = has_accelerator(keys)
    if accelerated or "on_cpu" not in variants or not keys["on_cpu"]:
        return build(keys), {}
    on_cpu = _parse_flags(flags, variants["on_cpu"])
    return build(on_cpu), {key: value for key, value in on_cpu.items() if value != keys[key]}


def cli_keys(argv: Sequence[str]) -> frozenset[str]:
    """The keys that a command line sets."""
    flags = (arg[2:].split("=")[0] for arg in argv if arg.startswith("--"))
    return frozenset(flag.replace("-", "_") for flag in flags)


def _split_config_path(argv: list[str]) -> tuple[str, list[str]]:
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


def _parse_flags(flags: list[str], base: Config) -> dict[str, Any]:
    """The keys of `base` with the command line's over them; tyro types, documents, suggests."""
    keys = base.to_dict()
    groups = [
        (g.__name__.lower(), g, g(**{f.name: keys[f.name] for f in dataclasses.fields(g)}))
        for g in GROUPS
    ]
    switches = {f"--{key}" for key, value in keys.items() if isinstance(value, bool)}
    parsed = tyro.cli(
        dataclasses.make_dataclass("Keys", groups),
        # a switch alone is on
        args=[
            f"{flag}=True" if flag in switches and following.startswith("--") else flag
            for flag, following in zip(flags, [*flags[1:], "--"], strict=False)
        ],
        prog="train.py --config FILE",
        description="Trains the GPT that FILE describes. Every key can be set here: --key=value.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        use_underscores=True,
    )
    for group in vars(parsed).values():
        check(group)
    return {k: v for group in vars(parsed).values() for k, v in vars(group).items()}
