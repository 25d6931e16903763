"""Bad input: one line, exit code 2, and nothing is compiled or overwritten; nothing leaks."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxgpt import sample
from jaxgpt.cli import commands as cli
from jaxgpt.data.prepare import prepare
from jaxgpt.model import GPT
from jaxgpt.runtime import device
from jaxgpt.train import Trainer, train

from .harness import TEXT, tiny

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def world(quiet, tmp_path, monkeypatch):
    """A dataset, a run of 24 steps, a config file, and a folder of weights that are not GPT-2's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "start", lambda *args, **kwargs: None)
    shutil.copytree(Path(quiet.data_dir, "tale"), "data/tale")
    shutil.copytree(quiet.out_dir, "run", symlinks=True)
    keys = {**quiet.to_dict(), "data_dir": "data", "out_dir": "run"}
    saved = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(saved | {"data_dir": "data", "out_dir": "run"}))
    Path("c.py").write_text(f"from jaxgpt.config import build\nconfig = build({keys})\n")
    Path("weights").mkdir()
    fields = {"vocab_size": 21, "n_positions": 8, "n_ctx": 8, "n_layer": 1, "n_head": 2}
    fields |= {"n_embd": 16, "model_type": "gpt2"}
    Path("weights/config.json").write_text(json.dumps(fields))
    save_file({"wte.weight": np.zeros((21, 8), "f4")}, "weights/model.safetensors")
    Path("latin-1.txt").write_bytes(b"caf\xe9 au lait")
    return tmp_path


def ids(change) -> None:
    """Rewrites the training split."""
    file = Path("data/tale/train.bin")
    old = np.fromfile(file, "<u2")
    new = change(old)
    file.write_bytes(new if isinstance(new, bytes) else new.tobytes())


def past_the_vocabulary(old: np.ndarray) -> np.ndarray:
    old[1234] = 999
    return old


def prepared_anew() -> None:
    Path("tale.txt").write_text(TEXT.replace("sound", "dnuos"))
    prepare("tale.txt", "data")


def meta(**fields) -> None:
    file = Path("data/tale/meta.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


TRAIN, NEW, SAMPLE = "train c.py", "train c.py --out_dir=new", "sample --out_dir=run"
NO_TOKEN = lambda: None
BAD = {
    "an id past the vocabulary": (lambda: ids(past_the_vocabulary), NEW, "id 999 at token 1234"),
    "half an id": (lambda: ids(lambda old: old.tobytes()[:-1]), NEW, "not a whole number"),
    "ids cut short": (lambda: ids(lambda old: old[:-5]), NEW, "meta.json says"),
    "no ids": (lambda: ids(lambda old: old[:0]), NEW, "holds no tokens"),
    "another dtype": (lambda: meta(dtype="uint32"), NEW, "meta.json says"),
    "a dtype that is none": (lambda: meta(dtype="object"), NEW, "dtype='object'"),
    "other data than before": (prepared_anew, f"{TRAIN} --max_iters=30", "changed since"),
    "no data": (NO_TOKEN, f"{NEW} --dataset=../../etc", "dataset="),
    "a text that is not UTF-8": (NO_TOKEN, "prepare latin-1.txt", "is not UTF-8"),
    "a text that is not there": (NO_TOKEN, "prepare no.txt", "no.txt"),
    "a prompt of unknown letters": (NO_TOKEN, f"{SAMPLE} --start=\u0416", "\u0416"),
    "a prompt file that is not there": (NO_TOKEN, f"{SAMPLE} --start=FILE:no", "No such file"),
    "a prompt file that is not UTF-8": (NO_TOKEN, f"{SAMPLE} --start=FILE:latin-1.txt", "decode"),
    "a step that is not there": (NO_TOKEN, f"{SAMPLE} --checkpoint=7", "checkpoint='7'"),
    "a run that is not there": (NO_TOKEN, "sample --out_dir=no", "there is no run"),
    "a config.json that is none": (
        lambda: Path("run/config.json").write_text('{"n_layer": 9e99}'),
        SAMPLE,
        "n_layer",
    ),
    "a config of a larger model": (
        lambda: Path("run/config.json").write_text(
            json.dumps(json.loads(Path("run/config.json").read_text()) | {"n_embd": 2**20})
        ),
        SAMPLE,
        "the shape of params",
    ),
    "another model than the checkpoint's": (NO_TOKEN, f"{TRAIN} --n_embd=32", "n_embd=32"),
    "weights of another shape": (NO_TOKEN, f"{NEW} --init_from=./weights", "tensor"),
    "a file that is no config": (lambda: Path("c.py").write_text("x = 1"), NEW, "c.py"),
    "a mesh of more devices": (NO_TOKEN, f"{NEW} --mesh=data:512", "mesh="),
    "a mesh of no axis": (NO_TOKEN, f"{NEW} --mesh=wings:2", "mesh="),
    "a mesh that divides nothing": (NO_TOKEN, f"{NEW} --mesh=tensor:8", "does not divide"),
    "a run directory that is a file": (NO_TOKEN, f"{TRAIN} --out_dir=c.py", "is a file"),
    "code for a number": (NO_TOKEN, f"{NEW} --n_layer=__import__('os').getpid()", "n_layer"),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2_before_anything_is_compiled(
    world, capsys, monkeypatch, case
):
    spoil, command, said = BAD[case]
    spoil()
    capsys.readouterr()
    before = contents(world / "run") | contents(world / "data")
    for owner, name in (Trainer, "_compile"), (Trainer, "evaluate"), (GPT, "features"):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("computes"))
    name, *argv = command.split(" ")
    with pytest.raises(SystemExit) as end:
        cli.run(cli.COMMANDS[name], argv)
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert said in errors
    assert "Traceback" not in errors
    if "code for" not in case:  # tyro's own answers are in a box
        assert [line for line in errors.splitlines() if line.startswith("error: ")] == [
            errors.splitlines()[-1]
        ]
    after = contents(world / "run") | contents(world / "data")
    ours = ("config.json", ".lock", "log.txt", "metrics.jsonl")
    assert {p for p in before if before[p] != after.get(p) and p.name not in ours} == set()


def test_what_the_environment_holds_is_in_nothing_that_a_run_writes(
    data, tmp_path, capsys, monkeypatch
):
    secrets = {
        name: f"canary-of-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_KEY")
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    config = tiny(tmp_path, data, max_iters=2, tensorboard=True)
    assert train(config, {}) == 0
    said = "".join(capsys.readouterr()).encode()
    written = contents(Path(config.out_dir))
    assert {"config.json", "log.txt", "metrics.jsonl", "meta.json"} <= {p.name for p in written}
    for value in secrets.values():
        assert not any(value.encode() in content for content in (said, *written.values()))


def test_what_a_model_says_does_not_steer_a_terminal(monkeypatch, capsys):
    said = [["\x1b]0;x\x07", "\x9b2J"]]
    monkeypatch.setattr(sample, "generate_text", lambda *args, **kwargs: iter(said))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli._speak(cli.SampleArgs(num_samples=2), SimpleNamespace(num_generated=1), None, ["a"])
    out = capsys.readouterr().out
    assert out.startswith("a\\x1b]0;x\\x07\n")
    assert "a\\x9b2J\n" in out
