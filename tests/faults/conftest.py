"""Define fixtures: a text, an uninterrupted run, and steps that are traced only once."""

import json
import secrets
import sys
from pathlib import Path

import pytest
from helpers import make_data

from jaxgpt.runtime import bucket as buckets
from jaxgpt.runtime import metrics, run_dir, storage
from jaxgpt.train import train

from .harness import tiny


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metrics, "draw_losses", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def quick():
    """Trace the training and evaluation steps once for all runs with the same keys."""
    with pytest.MonkeyPatch.context() as patched:
        for module, name in ("train", "make_train_step"), ("evaluate", "make_eval_step"):
            owner = sys.modules[f"jaxgpt.{module}"]
            patched.setattr(owner, name, _once(getattr(owner, name)))
        yield


ELSEWHERE = ("out_dir", "data_dir", "max_iters", "eval_interval", "save_interval", "sample_every")
MADE = {}


def _once(make):
    def once(config, mesh):
        keys = {k: v for k, v in config.to_dict().items() if k not in ELSEWHERE}
        key = make, json.dumps(keys), mesh
        if key not in MADE:
            MADE[key] = make(config, mesh)
        return MADE[key]

    return once


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def quiet(quick, data, tmp_path_factory):
    """Return an uninterrupted run of 24 steps with checkpoints 21, 24 and the best."""
    config = tiny(tmp_path_factory.mktemp("quiet"), data)
    assert train(config) == 0
    assert run_dir.open_checkpoints(config).steps()[-2:] == [21, 24]
    return config


@pytest.fixture(scope="module")
def short(quick, data, tmp_path_factory):
    """Return a local run of 6 steps with checkpoints 3 and 6."""
    config = tiny(tmp_path_factory.mktemp("short"), data, max_iters=6, eval_interval=3)
    assert train(config) == 0
    return config


@pytest.fixture(scope="session")
def store():
    """Start an S3 server."""
    from object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def bucket(store, tmp_path, monkeypatch):
    """Return the files of a new bucket, which runs find by the environment."""
    from object_store import Files

    for name, value in (store.env | {"HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "MIRRORS", tmp_path / "mirrors")
    monkeypatch.setattr(buckets, "DATA", tmp_path / "data")
    monkeypatch.setattr(storage, "_mirrors", {})
    return Files(store, f"test-{secrets.token_hex(4)}")
