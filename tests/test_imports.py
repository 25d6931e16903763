"""Test that imports follow the layers of the package, without cycles and side effects."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

PACKAGE = ROOT / "jaxgpt"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or not path.name.startswith("__")
}
# Layer -> the other layers that it may import from. Modules outside a folder are the layer
# `core`, except for `config` and `sharding`, which do not depend on a model.
ALLOWED = {
    "config": set(),
    "kernels": set(),
    "sharding": {"config", "kernels"},
    "data": {"config", "kernels", "sharding", "runtime.files", "runtime.bucket"},
    "runtime": {"config", "sharding", "kernels", "data"},
    "core": {"config", "sharding", "kernels", "data", "runtime"},
    "interop": {"config", "sharding", "kernels", "data", "runtime", "core"},
    "api": {"config", "sharding", "kernels", "data", "runtime", "core", "interop"},
    "tools": {"config", "sharding", "kernels", "data", "runtime", "core", "interop", "api"},
    "cli": {"config", "sharding", "kernels", "data", "runtime", "core", "interop", "api", "tools"},
}
# Modules that may import from one more layer, with the reason.
EXCEPTIONS = {
    "api": {"tools"},  # inside Run.report
    "config": {"core"},  # inside Config.make_model, whose default is a GPT
    "runtime.run_dir": {"core"},  # the shapes of the parameters that it loads
    "resolve": {"interop"},  # what `init_from` names
}


def room(module: str) -> str:
    if "." in module:
        return module.split(".")[0]
    return module if module in ALLOWED else "core"


def imported(tree: ast.AST, *, anywhere: bool = True) -> set[str]:
    """Find the package's modules that a file imports, by their names below `jaxgpt`."""
    names = set()
    for node in ast.walk(tree) if anywhere else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    below = {name.removeprefix("jaxgpt.") for name in names if name.startswith("jaxgpt.")}
    return below & MODULES.keys()


def parse(module: str) -> ast.AST:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_allowed_layers(module):
    own = room(module)
    allowed = ALLOWED[own] | EXCEPTIONS.get(module, set()) | {own}
    for name in imported(parse(module)):
        assert name in allowed or room(name) in allowed, f"{module} imports {name}"


def test_module_level_imports_have_no_cycle():
    graph = {module: imported(parse(module), anywhere=False) - {module} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # or CycleError


SIDE_EFFECTS = """
import importlib, json, logging, signal, sys, threading, warnings
import jax, orbax.checkpoint, flax, optax, tyro, rich.console  # their own effects come first


def state():
    loggers = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    return {
        "hooks": str([sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook]),
        "loggers": {name: level for name, level in loggers.items() if level},
        "signals": str(handlers),
        "warnings": len(warnings.filters),
        "path": sys.path,
        "jax": {key: str(value) for key, value in jax.config.values.items()},
        "backends": sorted(jax._src.xla_bridge._backends),
        "threads": threading.active_count(),
    }


found, before = {}, state()
for module in json.loads(sys.argv[1]):
    importlib.import_module(f"jaxgpt.{module}")
    after = state()
    changed = [key for key in after if after[key] != before[key]]
    if changed:
        found[module] = {key: [str(before[key]), str(after[key])] for key in changed}
    before = after
print(json.dumps(found))
"""


def test_importing_a_module_has_no_side_effects():
    """No hook, logger level, signal handler or JAX option changes, and JAX does not start."""
    command = [sys.executable, "-c", SIDE_EFFECTS, json.dumps(sorted(MODULES))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {}


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("import jaxgpt.model", "model"),
        ("import os, jaxgpt.data.text as t", "data.text"),
        ("from jaxgpt import loss as l", "loss"),
        ("from jaxgpt import kernels", "kernels"),
        ("from jaxgpt.data import tokenizer", "data.tokenizer"),
        ("from jaxgpt.sharding import param_sharding", "sharding"),
        ("def f():\n    if True:\n        from jaxgpt.cli import commands", "cli.commands"),
    ],
)
def test_import_finder_detects_every_import_form(statement, module):
    assert imported(ast.parse(statement)) - {"data", "cli"} == {module}
