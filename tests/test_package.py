"""Test the wheel: its files, and the commands in an empty folder."""

import os
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, make_data

PARTS = {
    "jaxgpt": "jaxgpt",
    "configs": "jaxgpt/shipped/configs",
    "examples": "jaxgpt/shipped/examples",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return the folder of an installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target=wheel", f"--directory={folder}"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("jaxgpt-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def jaxgpt(site, tmp_path):
    """Return a function that runs the wheel's command in an empty folder and returns its output."""
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
    return lambda *argv: run([sys.executable, "-m", "jaxgpt", *argv]).stdout


def test_wheel_holds_the_package_its_configs_and_its_examples(site):
    files = {str(path.relative_to(site)) for path in site.rglob("*.*") if path.is_file()}
    expected = {
        f"{place}/{path.relative_to(ROOT / part)}"
        for part, place in PARTS.items()
        for path in (ROOT / part).rglob("*.py")
    }
    packaged = {name for name in files if ".dist-info" not in name}
    assert packaged == expected | {"jaxgpt/py.typed", "jaxgpt/tools/report.html"}


@pytest.mark.parametrize("name", ["shakespeare", "speedrun"])
def test_wheel_finds_its_configs_by_name(jaxgpt, name):
    assert "--n_layer" in jaxgpt("train", name, "--help")


@pytest.mark.slow
def test_wheel_trains_and_samples_in_an_empty_folder(jaxgpt, tmp_path):
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data", name="shakespeare_char")
    keys = ["--max_iters=2", "--eval_iters=1", "--n_layer=1", "--device=cpu", "--out_dir=run"]
    for name in "shakespeare", "lecture/1_bigram":
        assert "run holds the run up to step 2" in jaxgpt("train", name, *keys, "--overwrite")
    sample = "sample", "--out_dir=run", "--max_new_tokens=5", "--num_samples=1", "--start=It"
    assert jaxgpt(*sample, "--config", "lecture/1_bigram").startswith("It")
