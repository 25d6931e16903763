"""Run a config file, which is the user's Python code, and return the configs that it builds.

The configs that come with jaxgpt also have names, such as `shakespeare`, for use in any folder.
"""

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from jaxgpt.config import Config, UserError

NAMES = ("config", "cpu_config", "baseline")  # the last is for `jaxgpt ablate`
EXPECTED = "expected a config file that runs without errors"
PACKAGE = Path(__file__).parents[1]
# The folder of configs/ and examples/: a part of the wheel, or the repository.
SHIPPED = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent


def load_config_file(path: str) -> dict[str, Config]:
    """Run a config file; return its `config`, and its `cpu_config` and `baseline` if it has them.

    `path` may also be the name of a config that comes with jaxgpt. Raises `UserError`, which names
    the wrong line of the file.
    """
    found = find_config_file(path)
    file = Path(found).resolve()
    # Dataclasses, type hints and --help look a class up in the module that defines it.
    name = "jaxgpt_config_" + re.sub(r"\W", "_", str(file))
    module = ModuleType(name)
    module.__file__ = str(file)
    with _importing_from(file.parent):
        sys.modules[name] = module
        try:
            SourceFileLoader(name, found).exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(format_config_error(found, error)) from error
    configs = {key: vars(module)[key] for key in NAMES if key in vars(module)}
    for key, value in ({"config": None} | configs).items():
        if not isinstance(value, Config):
            problem = f"builds no Config with the name {key}"
            raise UserError(f"config={path!r}: {problem}; expected `{key} = Config(...)` in it")
    return {key: config.replace(config_file=path) for key, config in configs.items()}


def shipped_names() -> list[str]:
    """Return the names of the configs that come with jaxgpt, such as lecture/1_bigram."""
    folder = SHIPPED / "configs"
    return [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.py")]


def find_config_file(path: str) -> str:
    """Return `path` if it is a file, or else the file of the shipped config with this name.

    Raises `UserError` with the nearest path or name.
    """
    if Path(path).is_file():
        return path
    names = shipped_names()
    if path in names:
        return str(SHIPPED / "configs" / f"{path}.py")
    files = [str(file) for file in sorted(Path("configs").rglob("*.py"))]
    nearest = difflib.get_close_matches(path, [*files, *names], n=1, cutoff=0.5)
    expected = "expected a Python file, or the name of a config that comes with jaxgpt"
    advice = nearest[0] if nearest else "shakespeare"
    problem = "is a folder" if Path(path).is_dir() else "no such file"
    raise UserError(f"config={path!r}: {problem}; {expected}; try {advice}")


_imported: set[str] = set()  # modules that config files imported from their own folders


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Put `folder` first on the import path, and forget the modules of earlier config files.

    Imported modules stay until the next config file runs, because --help reads their source.
    """
    for name in _imported:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    modules, path, dont_write = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    here = str(Path.cwd())
    if SHIPPED in folder.parents:  # it imports what is shipped, and no folder of the same name here
        others = [place for place in path if place not in ("", here)]
        sys.path[:] = [str(folder), str(SHIPPED), *others]
    else:
        sys.path[:] = [str(folder), here, *path, str(SHIPPED)]
    sys.dont_write_bytecode = True  # leave no __pycache__ beside the user's files
    try:
        yield
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = dont_write
        for name in sys.modules.keys() - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and folder in Path(file).parents:
                _imported.add(name)


def format_config_error(path: str, error: BaseException) -> str:
    """Format an error in a config file as one line: its place, the line there, the problem."""
    if isinstance(error, SyntaxError) and error.lineno:
        place = f"{error.filename or path}, line {error.lineno}: {(error.text or '').strip()!r}"
        return f"{place}: {error.msg}; expected valid Python"
    if isinstance(error, UserError):
        message = str(error)
    else:
        message = " ".join("".join(traceback.format_exception_only(error)).split())
        message = f"{message}; {EXPECTED}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if not frames:
        return f"{path}: {message}"
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    first, last = frames[-1].lineno or 1, frames[-1].end_lineno or 1
    key = re.match(r"\w+", message)
    named = [n for n in range(first, last + 1) if key and re.search(rf"\b{key[0]}\b", lines[n - 1])]
    number = named[0] if named else first
    return f"{path}, line {number}: {lines[number - 1].strip()!r}: {message}"
