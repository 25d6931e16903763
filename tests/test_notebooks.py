"""Test the notebooks: what is in the files, and that each runs to its end with small settings."""

import os
import re

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 1_000_000
# Folders of the machine that ran a notebook; /content is Colab's.
MACHINE_PATH = re.compile(
    r"(?<![\w./])/(?:home|root|tmp|Users|usr|opt|work|mnt|content)/|\b[A-Z]:\\"
)
ONLY_IN_TESTS = {"JAX_NUM_CPU_DEVICES"}  # a reader has one virtual device per core
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the texts that the cells printed or returned, and those of errors."""
    texts = []
    for output in outputs(notebook):
        kinds = output.get("data", {}).items()
        texts += [output.get("text", ""), "\n".join(output.get("traceback", []))]
        texts += [str(data) for kind, data in kinds if not kind.startswith("image/")]
    return texts


def test_there_are_notebooks():
    assert NOTEBOOKS


@ALL
def test_committed_notebook_was_executed_once_in_order_without_errors(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata.kernelspec.name == "python3"
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


@ALL
def test_committed_notebook_is_small_and_names_no_path_of_a_machine(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    for text in [cell.source for cell in notebook.cells] + texts(notebook):
        found = MACHINE_PATH.search(text)
        assert not found, text[found.start() : found.start() + 80]


@pytest.mark.slow
@ALL
def test_notebook_runs_with_small_settings_in_a_fresh_kernel(path, tmp_path):
    (ROOT / "data").mkdir(exist_ok=True)
    (tmp_path / "data").symlink_to(ROOT / "data")  # a corpus is prepared once for all tests
    env = {key: value for key, value in os.environ.items() if key not in ONLY_IN_TESTS}
    env |= {"QUICK": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute(env=env)
    assert not [text for text in texts(notebook) if "Traceback (most recent call last)" in text]
