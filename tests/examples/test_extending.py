"""Test the model of docs/extending.md in training, evaluation, sampling, plan and bench."""

import re
from pathlib import Path

import jax
import pytest
from helpers import ROOT, make_data, rows_of

from jaxgpt.cli import commands
from jaxgpt.runtime import device, run_dir
from jaxgpt.runtime.config_file import load_config_file
from jaxgpt.tools import plan
from jaxgpt.tools.bench import sampling, training

TINY = [
    *("--n_layer=1", "--n_embd=16", "--state_dim=8", "--block_size=8", "--batch_size=4"),
    *("--eval_interval=4", "--eval_iters=1", "--warmup_iters=2", "--dataset=tale", "--seed=3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Yield a working directory with the page's config file and a dataset."""
    folder = tmp_path_factory.mktemp("extending")
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(# my_model\.py\n.*?)```", page, re.DOTALL)
    (folder / "my_model.py").write_text(block, encoding="utf-8")
    (folder / "data").mkdir()
    make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(device, "start", lambda *args, **keys: None)
        yield folder


def call(name: str, *argv: str) -> int | None:
    return commands.COMMANDS[name](["--config", "my_model.py", *argv])


@pytest.fixture(scope="module")
def run(folder) -> run_dir.Config:
    """Return the config of a run of eight steps that was stopped after four and resumed."""
    for flags in ["--max_iters=4"], ["--max_iters=8", "--init_from=resume"]:
        assert call("train", *TINY, "--lr_decay_iters=8", "--out_dir=run", *flags) == 0
    return run_dir.load_config("run", "my_model.py")


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_run(run):
    assert call("train", *TINY, "--lr_decay_iters=8", "--max_iters=8", "--out_dir=whole") == 0
    whole = rows_of(run_dir.load_config("whole", "my_model.py"))
    steps = [row for row in whole if "loss" in row]
    assert [row for row in rows_of(run) if "loss" in row] == steps
    assert len(steps) == 8
    assert run.state_dim == 8


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2", "data:2,fsdp:2"])
def test_mesh_changes_losses_only_by_rounding(run, mesh):
    flags = ["--lr_decay_iters=8", "--max_iters=4", f"--mesh={mesh}", f"--out_dir={mesh}"]
    assert call("train", *TINY, *flags) == 0
    mine = [row["loss"] for row in rows_of(run) if "loss" in row][:4]
    other = rows_of(run_dir.load_config(mesh, "my_model.py"))
    assert [row["loss"] for row in other if "loss" in row] == pytest.approx(mine, rel=1e-5)


def test_eval_reports_the_last_full_val_loss(run, capsys):
    call("eval", "--out_dir=run")
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    last = [row for row in rows_of(run) if "full_val_loss" in row][-1]
    assert said["step"] == "8"
    assert float(said["val_loss"]) == pytest.approx(last["full_val_loss"], rel=1e-5)


def test_samples_continue_the_prompt_beyond_block_size(run, capsys):
    """The text becomes longer than block_size."""
    call("sample", "--out_dir=run", "--start=It is", "--num_samples=2", "--max_new_tokens=20")
    texts = capsys.readouterr().out.split("\n" + commands.SEPARATOR)
    assert all(text.strip("\n").startswith("It is") for text in texts[:2])
    assert len(texts[0]) == len("It is") + 20


@pytest.mark.parametrize("name", ["eval", "sample"])
def test_missing_config_file_error_names_the_class_and_the_flag(run, name):
    said = r"its config class is MinGRUConfig; try --config my_model\.py"
    with pytest.raises(run_dir.UserError, match=said):
        commands.COMMANDS[name](["--out_dir=run"])


@pytest.mark.slow
def test_plan_and_bench_accept_a_user_model(folder, monkeypatch, capsys):
    config = load_config_file("my_model.py")["config"].replace(
        vocab_size=31, n_layer=1, n_embd=16, batch_size=8, block_size=8, dtype="float32"
    )
    here = plan.Topology("here:8", plan.CHIPS["h100"], jax.devices(), 8)
    assert "parameters" in plan.format_plan(plan.make_plan(config, here))
    monkeypatch.setattr(training, "ROUND_S", 0.001)
    monkeypatch.setattr(sampling, "NEW_TOKENS", 20)
    monkeypatch.setattr(sampling, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    Path("small.py").write_text(
        Path("my_model.py").read_text(encoding="utf-8")
        + "\nconfig = config.replace(n_layer=1, n_embd=16, batch_size=8, block_size=8)\n"
    )
    for benchmark in "train", "sample":
        commands.COMMANDS["bench"](
            ["--config", "small.py", f"--benchmark={benchmark}", "--repeats=1"]
        )
        assert f"{benchmark}, small.py" in capsys.readouterr().out
