"""Test that a run records its config class and loads the class from a named config file."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_run

from jaxgpt.config import UserError
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.config_file import load_config_file

FILE = """
from dataclasses import dataclass

from jaxgpt.config import Config

raise_if_imported = {raises}


@dataclass(frozen=True, kw_only=True)
class {name}(Config):
    width: int = 8


config = {name}(width=9)
"""


def test_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_dir.fcntl, "flock", flock)
    with run_dir.lock_run_dir(str(tmp_path / "run")):
        said = capsys.readouterr().err
    assert "cannot be locked (no locks available); expected no other process that writes" in said


def test_full_disk_does_not_keep_a_run_from_its_lock(tmp_path, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_dir.os, "write", write)
    with run_dir.lock_run_dir(str(tmp_path / "run")):
        assert (tmp_path / "run" / ".lock").exists()


@pytest.fixture
def own_run(tmp_path, monkeypatch):
    """Create a run whose config class is defined in mine.py; return the config."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE.format(name="WideConfig", raises=0))
    config = load_config_file("mine.py")["config"].replace(out_dir="run", n_layer=1)
    run_dir.create(config, SimpleNamespace(tokenizer=None), fresh=True)
    return config


def test_run_records_config_class_and_file(own_run):
    saved = json.loads(Path("run/config.json").read_text())
    assert saved == {"config_file": "mine.py", "config_class": "WideConfig"} | own_run.to_dict()
    again = run_dir.load_config("run", "mine.py")
    assert again.to_dict() == own_run.to_dict()
    assert (type(again).__name__, again.config_file) == ("WideConfig", "mine.py")


def test_user_config_file_is_imported_only_if_named(own_run):
    Path("mine.py").write_text(FILE.format(name="WideConfig", raises="1 / 0"))
    with pytest.raises(UserError) as raised:
        run_dir.load_config("run")
    assert str(raised.value) == (
        "out_dir='run': its config class is WideConfig; "
        "try --config mine.py, which defines this class"
    )
    with pytest.raises(UserError, match="division by zero"):
        run_dir.load_config("run", "mine.py")


def test_config_file_of_another_class_is_rejected(own_run):
    Path("other.py").write_text(FILE.format(name="OtherConfig", raises=0))
    with pytest.raises(UserError, match=r"its config class is WideConfig; try --config mine\.py"):
        run_dir.load_config("run", "other.py")
    plain = tiny_run("plain", "data")
    run_dir.create(plain, SimpleNamespace(tokenizer=None), fresh=True)
    assert run_dir.load_config("plain") == plain
    with pytest.raises(UserError, match="is Config; expected WideConfig; try without --config"):
        run_dir.load_config("plain", "mine.py")


def test_existing_model_keys_are_adopted_and_conflicting_user_keys_rejected(own_run):
    unset = own_run.replace(width=8)
    assert run_dir.merge_model_keys(unset, {"width": 5}, "it", frozenset()).width == 5
    for config, cli_keys in (own_run, frozenset()), (unset, frozenset({"width"})):
        with pytest.raises(UserError, match="differs from it; expected 5; try --width=5"):
            run_dir.merge_model_keys(config, {"width": 5}, "it", cli_keys)
