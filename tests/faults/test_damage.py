"""Test that checkpoint damage is detected and the run resumes from the step before."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import refusal, rows_of

from jaxgpt.runtime import checkpoint, run_dir
from jaxgpt.runtime.checkpoint import Checkpoints, CorruptCheckpoint
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.train import train

from .harness import damage_at_random, outcome, sign_again

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def run(quiet, tmp_path):
    """Return a copy of the uninterrupted run, to be damaged."""
    shutil.copytree(quiet.out_dir, tmp_path / "run", symlinks=True)
    return quiet.replace(out_dir=str(tmp_path / "run"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def step_of(config, step: int) -> Path:
    return Path(config.out_dir, "checkpoints", str(step))


def data_file(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.slow
def test_random_checkpoint_damage_is_always_detected(quiet, tmp_path):
    assert damage_at_random(quiet, tmp_path, 100, random.Random(100)) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["data", "meta.json", "digest.json", "no digest"])
def test_damaged_newest_step_falls_back_to_bit_exact_previous_step(quiet, run, capsys, target):
    newest = step_of(run, 24)
    if target == "no digest":
        (newest / "digest.json").unlink()
    else:
        flip(data_file(newest) if target == "data" else newest / target)
    assert train(run) == 0
    said = capsys.readouterr()
    assert "resuming from step 21" in said.out
    assert f"warning: {newest}" in said.err
    assert outcome(run) == outcome(quiet)
    assert newest.with_name("24.corrupt").exists() == (target != "no digest")


def test_two_damaged_steps_are_quarantined_and_the_third_is_used(run):
    checkpoints = Checkpoints(step_of(run, 24).parent, keep=3)
    shutil.copytree(step_of(run, 21), step_of(run, 22))
    flip(data_file(step_of(run, 24)))
    checkpoints.quarantine_corrupt()  # the files of 22 are intact, but name step 21
    assert checkpoints.newest == 21
    assert {p.name for p in checkpoints.damaged()} == {"22.corrupt", "24.corrupt"}


def test_run_with_all_steps_damaged_is_rejected_and_nothing_is_deleted(run):
    folder = step_of(run, 24).parent
    for step in Checkpoints(folder).steps():
        flip(data_file(folder / str(step)))
    rows = rows_of(run)
    for init_from in "auto", "auto", "resume", "scratch":
        message = refusal(train, run.replace(init_from=init_from))
        how = "--init_from=auto --overwrite" if init_from == "resume" else "--overwrite"
        assert re.search(f"all of its checkpoints are damaged.*; try {how} to delete", message)
    assert rows_of(run) == rows
    assert len(Checkpoints(folder).damaged()) >= 2


def test_damaged_best_step_is_quarantined_and_a_later_step_becomes_best(run):
    folder = step_of(run, 24).parent
    checkpoints, state = Checkpoints(folder), {"params": {"w": np.zeros(2)}}
    earlier = {"step": 20, "best_val_loss": 0.0}  # better than any to come
    checkpoints.save(state, earlier, best=True)
    checkpoints.wait()
    assert checkpoints.best() == 20
    flip(data_file(folder / "20"))
    assert train(run.replace(max_iters=32)) == 0
    assert Checkpoints(folder).best() == 32
    assert (folder / "20.corrupt").exists()


@pytest.mark.parametrize("checkpoint", ["best", "latest"])
def test_loading_params_skips_a_damaged_step_and_moves_no_files(run, capsys, checkpoint):
    bad, instead = {"best": (16, 24), "latest": (24, 21)}[checkpoint]
    flip(data_file(step_of(run, bad)))
    config = run_dir.load_config(run.out_dir)
    before = sorted(Path(run.out_dir).rglob("*"))
    assert run_dir.open_checkpoints(run).best() == 16
    _, step = run_dir.load_params(config, checkpoint, local_mesh())
    assert step == instead
    assert f"taking step {instead} instead" in capsys.readouterr().err
    assert sorted(Path(run.out_dir).rglob("*")) == before
    with pytest.raises(CorruptCheckpoint):
        run_dir.load_params(config, str(bad), local_mesh())


def test_best_step_without_a_link_is_found(run):
    """A kill between writing the digest and making the link leaves such a directory."""
    checkpoints = run_dir.open_checkpoints(run)
    assert checkpoints.best() == 16
    (checkpoints.folder / "best").unlink()
    checkpoints.quarantine_corrupt()
    assert checkpoints.best() == 16


def test_step_of_a_later_format_is_rejected_but_not_quarantined(run):
    step = step_of(run, 24)
    meta = json.loads((step / "meta.json").read_text())
    (step / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))
    sign_again(step)
    assert "format 99" in refusal(train, run)
    assert step.exists()


def test_old_step_is_kept_until_the_new_step_is_verified(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = {"params": {"w": np.arange(1000.0)}}
    checkpoints.save(state, {"step": 1}, best=False)
    checkpoints.wait()
    write = checkpoint.atomic_write

    def then_cut(file, text):
        write(file, text)
        if file.name == "digest.json":
            data_file(file.parent).write_bytes(b"")

    monkeypatch.setattr(checkpoint, "atomic_write", then_cut)
    checkpoints.save(state, {"step": 2}, best=False)
    with pytest.raises(CorruptCheckpoint):
        checkpoints.wait()
    again = Checkpoints(tmp_path)
    again.quarantine_corrupt()
    assert again.newest == 1
