"""The modules stand in one order: each imports only from those before it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxgpt"
ORDER = [
    "config",
    *("data.text", "data.tokenizer", "data.order", "data.tokens", "data.examples"),
    *("data.documents", "data.tasks", "data.prepare"),
    *("layers", "attention", "model", "loss", "optimizer", "sharding"),
    *("data.batches", "train_step", "runtime.distributed", "runtime.checkpoint", "runtime.run_dir"),
    *("interop.huggingface", "interop.export", "runtime.device", "sample", "evaluate"),
    *("cli.command_line", "tools.hlo", "tools.plan", "runtime.metrics", "train"),
    *("tools.bench.torch_server", "tools.bench.nanogpt", "tools.bench.training"),
    *("tools.bench.command", "tools.ablate", "cli.commands"),
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imported(tree: ast.AST) -> set[str]:
    """The modules of ours that a file imports, anywhere in it: by their names below `jaxgpt`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    below = {name.removeprefix("jaxgpt.") for name in names if name.startswith("jaxgpt.")}
    return below & MODULES.keys()


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_before_it(module):
    allowed = set(ORDER[: ORDER.index(module)])
    assert imported(ast.parse(MODULES[module].read_text(encoding="utf-8"))) <= allowed


def test_the_packages_themselves_import_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        assert not imported(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("import jaxgpt.model", "model"),
        ("import os, jaxgpt.data.text as t", "data.text"),
        ("from jaxgpt import loss as l", "loss"),
        ("from jaxgpt.data import tokenizer", "data.tokenizer"),
        ("from jaxgpt.sharding import param_sharding", "sharding"),
        ("def f():\n    if True:\n        from jaxgpt.cli import commands", "cli.commands"),
    ],
)
def test_every_way_to_import_is_seen(statement, module):
    assert imported(ast.parse(statement)) == {module}
