"""Test that bad input exits with code 2 in one line, computes nothing and keeps all data."""

import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from helpers import ERROR_FORM, TEXT, exit_code, write_config
from safetensors.numpy import save_file

from jaxgpt import evaluate, sample
from jaxgpt.cli import commands as cli
from jaxgpt.data import text_stream
from jaxgpt.data.prepare import prepare
from jaxgpt.model import GPT
from jaxgpt.runtime import device, run_dir

from .harness import tiny

LOOP = sys.modules["jaxgpt.train"]  # `jaxgpt.train` is the function
pytestmark = pytest.mark.usefixtures("quick")


def edit_json(file: str, **fields) -> None:
    """Change some fields of a JSON file."""
    path = Path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def world(quiet, tmp_path, monkeypatch):
    """Create a dataset, a run of 24 steps, a config file and weights of a wrong shape."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "start", lambda *args, **kwargs: None)
    shutil.copytree(Path(quiet.data_dir, "tale"), "data/tale")
    shutil.copytree(quiet.out_dir, "run", symlinks=True)
    places = {"data_dir": "data", "out_dir": "run"}
    edit_json("run/config.json", **places)
    write_config(Path("c.py"), quiet.to_dict() | places)
    Path("weights").mkdir()
    sizes = {"vocab_size": 21, "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
    Path("weights/config.json").write_text(json.dumps(sizes | {"model_type": "gpt2"}))
    save_file({"wte.weight": np.zeros((21, 8), "f4")}, "weights/model.safetensors")
    Path("latin-1.txt").write_bytes(b"caf\xe9 au lait")
    return tmp_path


IDS = Path("data/tale/train.bin")
META = "data/tale/meta.json"
edit_run = partial(edit_json, "run/config.json")
nothing = lambda: None


def id_past_the_vocabulary() -> None:
    ids = np.fromfile(IDS, "<u2")
    ids[1234] = 999
    ids.tofile(IDS)


def cut_ids(bytes_left: int) -> None:
    IDS.write_bytes(IDS.read_bytes()[:bytes_left])


def prepare_other_text() -> None:
    Path("tale.txt").write_text(TEXT.replace("sound", "dnuos"))
    prepare("tale.txt", "data", overwrite=True)


def write_uint32() -> None:
    Path("data/wide").mkdir()
    shutil.copy(IDS, "data/wide/train.bin")
    np.fromfile("data/tale/val.bin", "<u2").astype("<u4").tofile("data/wide/val.bin")


def copy_ids() -> None:
    """Make a dataset of nanoGPT's files, whose tokenizer is not known."""
    Path("data/foreign").mkdir()
    for name in "train.bin", "val.bin":
        shutil.copy(f"data/tale/{name}", "data/foreign")


def prepare_other_tokenizer(name: str) -> None:
    Path(f"{name}.txt").write_text(TEXT.replace("sound", "fury"))
    prepare(f"{name}.txt", "data", "byte", overwrite=True)


def forget_tokenizer() -> None:
    """Make the run one that was trained on token files without a known tokenizer."""
    prepare_other_tokenizer("song")
    Path("run/tokenizer.json").unlink()


TRAIN, NEW, SAMPLE = "train c.py", "train c.py --out_dir=new", "sample --out_dir=run"
BAD = {
    "an id past the vocabulary": (id_past_the_vocabulary, NEW, "id 999 at token 1234"),
    "half an id": (partial(cut_ids, -1), NEW, "not a whole number"),
    "ids cut short": (partial(cut_ids, -10), NEW, "meta.json says"),
    "no ids": (partial(cut_ids, 0), NEW, "holds no tokens"),
    "another dtype": (partial(edit_json, META, dtype="uint32"), NEW, "meta.json says"),
    "an unknown dtype": (partial(edit_json, META, dtype="object"), NEW, "dtype='object'"),
    "other data than before": (prepare_other_text, f"{TRAIN} --max_iters=30", "files have changed"),
    "a resume on data of another tokenizer": (
        partial(prepare_other_tokenizer, "song"), f"{TRAIN} --dataset=song --max_iters=30",
        "song': its tokenizer is not the one in run/tokenizer.json"),
    "a resume on its data in another tokenizer": (
        partial(prepare_other_tokenizer, "tale"), f"{TRAIN} --max_iters=30", "files have changed"),
    "a resume on data of another vocabulary": (
        forget_tokenizer, f"{TRAIN} --dataset=song --max_iters=30", "a vocabulary of 256 ids"),
    "an evaluation on data of another tokenizer": (
        partial(prepare_other_tokenizer, "song"), "eval --out_dir=run --dataset=song",
        "song': its tokenizer is not the one in run/tokenizer.json"),
    "no data": (nothing, f"{NEW} --dataset=../../etc", "dataset="),
    "a text that is not UTF-8": (nothing, "prepare latin-1.txt", "is not UTF-8"),
    "a text of a name that is taken": (
        partial(Path("tale.txt").write_text, TEXT[::-1]), "prepare tale.txt",
        "data/tale: holds a dataset of another text ("),
    "a tokenizer of a name that is taken": (
        partial(Path("tale.txt").write_text, TEXT), "prepare tale.txt --tokenizer=byte",
        "data/tale: holds a dataset of another tokenizer (char, 21 ids)"),
    "a text that is not there": (nothing, "prepare no.txt", "neither a text file, a folder nor"),
    "a prompt of unknown letters": (nothing, f"{SAMPLE} --start=\u0416", "\u0416"),
    "a prompt file that is not there": (nothing, f"{SAMPLE} --start=FILE:no", "no': no such file"),
    "a prompt file that is not UTF-8": (
        nothing, f"{SAMPLE} --start=FILE:latin-1.txt", "latin-1.txt': byte 3 is not UTF-8"),
    "a prompt file that is a folder": (nothing, f"{SAMPLE} --start=FILE:run", "run': is a folder"),
    "a tokenizer of no JSON": (
        partial(Path("run/tokenizer.json").write_text, '{"type": "char"'), SAMPLE,
        "run/tokenizer.json: not a tokenizer (line 1 is not valid JSON)"),
    "a tokenizer that is not there": (
        partial(Path("run/tokenizer.json").unlink), SAMPLE, "not a tokenizer (no such file)"),
    "a text that is a folder": (
        partial(Path("data/shakespeare_plays/input.txt").mkdir, parents=True),
        f"{NEW} --dataset=shakespeare_plays", "input.txt: is a folder; expected a UTF-8 text"),
    "a meta.json that is a folder": (
        partial(Path("data/other/meta.json").mkdir, parents=True), f"{NEW} --dataset=other",
        "data/other/meta.json: is a folder"),
    "a config file that exits": (
        partial(Path("c.py").write_text, "import sys\nsys.exit(3)\n"), NEW,
        "c.py, line 2: 'sys.exit(3)': SystemExit: 3; expected a config file that runs without"),
    "a config file that is a folder": (nothing, "train run", "config='run': is a folder"),
    "ids of another dtype without a meta.json": (
        write_uint32, f"{NEW} --dataset=wide", "data/wide/val.bin: looks like uint32 ids"),
    "a flag given twice": (nothing, f"{NEW} --seed=1 --seed=2", "--seed: given 2 times (1, 2)"),
    "a step that is not there": (nothing, f"{SAMPLE} --checkpoint=7", "checkpoint='7'"),
    "a run that is not there": (nothing, "sample --out_dir=no", "no run in it"),
    "a config.json with a bad value": (partial(edit_run, n_layer=9e99), SAMPLE, "n_layer"),
    "a config.json of a larger model": (partial(edit_run, n_embd=2**20), SAMPLE, "the shape of p"),
    "a run of another config class": (
        partial(edit_run, config_class="Mine", config_file="m.py"), SAMPLE, "try --config m.py"),
    "a config file of another class": (nothing, f"{SAMPLE} --config=no.py", "no.py': no such file"),
    "another model than the checkpoint's": (nothing, f"{TRAIN} --n_embd=32", "n_embd=32"),
    "weights of another shape": (nothing, f"{NEW} --init_from=./weights", "tensor"),
    "a file that is no config": (partial(Path("c.py").write_text, "x = 1"), NEW, "c.py"),
    "a mesh of more devices": (nothing, f"{NEW} --mesh=data:512", "mesh="),
    "a mesh of no axis": (nothing, f"{NEW} --mesh=wings:2", "mesh="),
    "a mesh that divides nothing": (nothing, f"{NEW} --mesh=tensor:8", "does not divide"),
    "an export to an object store": (
        nothing, "export --out_dir=run --to=s3://bucket/run", "to='s3://bucket/run': is in an obj"),
    "a text whose name cannot be a dataset's": (
        partial(Path("poems,2.txt").write_text, TEXT), "prepare poems,2.txt",
        "poems,2.txt: 'poems,2' cannot be the name of a dataset; expected letters, digits and"),
    "a report of an encoder": (
        nothing, f"{NEW} --causal=False --report", "report=True: an encoder cannot be sampled"),
    "a report without a tokenizer": (
        copy_ids, f"{NEW} --dataset=foreign --report", "report=True: the tokenizer of dataset='f"),
    "samples of an encoder": (
        nothing, f"{NEW} --causal=False --sample_every=1", "sample_every=1: an encoder cannot be"),
    "weights of no name": (nothing, "sample --init_from=gpt5", "init_from='gpt5': no such weights"),
    "a run directory that is a file": (nothing, f"{TRAIN} --out_dir=c.py", "is a file"),
    "an end-of-text past the vocabulary": (
        nothing, f"{NEW} --eot_id=21", "eot_id=21: not in the vocabulary; expected an id below"),
    "more steps than an int32 counts": (
        nothing, f"{NEW} --max_iters=2147483648", "max_iters=2147483648: invalid value"),
    "a process without a coordinator": (
        nothing, f"{NEW} --process_id=1", "process_id=1: no coordinator; expected the host:port"),
    "a prompt of an interactive session": (
        nothing, f"{SAMPLE} --start=a --interactive", "start: --interactive asks for prompts"),
    "a checkpoint of weights to export": (
        nothing, "export --init_from=./weights --checkpoint=latest --to=x",
        "checkpoint='latest': only a run has checkpoints"),
    "a config file of weights": (
        nothing, "eval --init_from=./weights --config=c.py",
        "config='c.py': only a run has a config file; try --init_from=resume"),
    "a checkpoint of weights": (
        nothing, "sample --init_from=./weights --checkpoint=latest",
        "checkpoint='latest': only a run has checkpoints"),
    "questions for a loss": (
        nothing, "eval --out_dir=run --hellaswag_file=q.jsonl",
        "hellaswag_file='q.jsonl': the loss needs no questions; try --task=hellaswag"),
    "a dataset for HellaSwag": (
        nothing, "eval --out_dir=run --task=hellaswag --dataset=tale",
        "dataset='tale': HellaSwag has its own questions; try --task=loss"),
    "a path that is too long": (nothing, "prepare " + 300 * "x", "x: file name too long; expected"),
    "code for a number": (nothing, f"{NEW} --n_layer=__import__('os').getpid()", "n_layer"),
}  # fmt: skip


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


COMPUTE = [(LOOP, "make_train_step"), (evaluate, "make_eval_step"), (GPT, "__call__")]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_code_2_in_one_line_and_computes_nothing(
    world, capsys, monkeypatch, case
):
    spoil, command, said = BAD[case]
    spoil()
    capsys.readouterr()
    before = contents(world / "run") | contents(world / "data")
    load = [] if "prompt" in case else [(sample.Sampler, "load")]  # weights come before prompts
    for owner, name in COMPUTE + load:
        monkeypatch.setattr(owner, name, lambda *args, **keys: pytest.fail("computes"))
    name, *argv = command.split(" ")
    assert exit_code(cli.run, cli.COMMANDS[name], argv) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert lines == errors.splitlines()[-1:]
    assert ERROR_FORM.fullmatch(lines[0].removeprefix("error: "))
    after = contents(world / "run") | contents(world / "data")
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    assert changed <= {".lock"}


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_model_too_large_for_the_memory_is_one_line(world, capsys, monkeypatch, command):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    monkeypatch.setattr(run_dir, "load_params", Mock(side_effect=full))
    assert exit_code(cli.run, cli.COMMANDS[command], ["--out_dir=run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit into the device's memory (Out of memory allocating 9 bytes); try" in line


def test_character_that_stdout_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert exit_code(cli.run, lambda argv: print("caf\xe9", flush=True), []) is None
    assert raw.getvalue() == b"caf\\xe9\n"


def test_run_output_contains_no_environment_secrets(data, tmp_path, capsys, monkeypatch):
    for name in "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_KEY":
        monkeypatch.setenv(name, f"canary-of-{name}")
    config = tiny(tmp_path, data, max_iters=2, tensorboard=True)
    assert LOOP.train(config) == 0
    printed = "".join(capsys.readouterr()).encode()
    written = contents(Path(config.out_dir))
    assert {"config.json", "log.txt", "metrics.jsonl", "meta.json"} <= {p.name for p in written}
    for content in printed, *written.values():
        assert b"canary-of-" not in content


def test_generated_control_characters_are_escaped_on_a_terminal(monkeypatch, capsys):
    pieces = [["\x1b]0;x\x07", "\x9b2J"]]
    monkeypatch.setattr(text_stream, "generate_text", lambda *args, **keys: iter(pieces))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sampler = SimpleNamespace(num_generated=1)
    cli.print_samples(cli.SampleArgs(num_samples=2), sampler, None, ["a"])
    out = capsys.readouterr().out
    assert out.startswith("a\\x1b]0;x\\x07\n")
    assert "a\\x9b2J\n" in out
