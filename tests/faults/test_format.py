"""Test that old checkpoints load, false metadata is rejected, and no data is run as code."""

import ast
import json
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
from golden.make_checkpoint_v1 import HERE, sums
from helpers import refusal

import jaxgpt
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.mesh import local_mesh

from .harness import sign_again

PACKAGE = Path(jaxgpt.__file__).parent


def test_format_1_checkpoint_loads():
    config = run_dir.load_config(str(HERE))
    params, step = run_dir.load_params(config, "best", local_mesh())
    assert step == 2
    assert run_dir.open_checkpoints(config).meta(2)["format_version"] == 1
    assert sums(params) == pytest.approx(json.loads((HERE / "sums.json").read_text()), rel=1e-9)
    assert sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file()) < 100_000


@pytest.mark.parametrize("liar", ["config", "array"])
def test_huge_shapes_are_rejected_without_allocating_memory(tmp_path, liar):
    """The config, or the metadata of an array, claims a size of terabytes."""
    shutil.copytree(HERE, tmp_path / "run", symlinks=True)
    config, step = run_dir.load_config(str(tmp_path / "run")), tmp_path / "run/checkpoints/2"
    if liar == "config":
        config = config.replace(n_embd=2**20, block_size=2**30)
    else:
        import tensorstore as ts

        folder = f"file://{step}/state/params/"
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": folder}}
        spec["path"] = "embed.kernel"
        spec["metadata"] = {"shape": [2**30, 2**12], "dtype": "<f4", "chunks": [2**10, 2**12]}
        ts.open(spec, create=True, delete_existing=True).result()
        sign_again(step)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "the shape of params" in refusal(run_dir.load_params, config, "2", local_mesh())
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < 500e6


FORBIDDEN = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
TEXTS = r"allow_pickle\s*=\s*True|weights_only\s*=\s*False|shell\s*=\s*True|trust_remote_code"
TEXTS += r"|yaml\.load|os\.system|extractall"


def offences(source: str) -> list[str]:
    """Return the parts of a module's source that could run data as code."""
    found = re.findall(TEXTS, source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in FORBIDDEN else []
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_package_source_has_no_calls_that_run_data_as_code(file):
    assert offences(file.read_text(encoding="utf-8")) == []


OFFENCES = [
    "import pickle", "from pickle import load", "eval(x)", "exec(open(f).read())", "yaml.load(f)",
    "run(c, shell=True)", "np.load(f, allow_pickle=True)", "torch.load(f, weights_only=False)",
    "load_dataset(n, trust_remote_code=True)",
]  # fmt: skip


@pytest.mark.parametrize("line", OFFENCES)
def test_source_search_detects_forbidden_constructs(line):
    assert offences(line)
