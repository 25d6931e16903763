"""Test config files, flags, help and exit codes of the command line."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from config_strategy import HINTS, configs
from helpers import CHILD_ENV, ROOT, exit_code, refusal
from hypothesis import given, settings

from jaxgpt import __version__
from jaxgpt.cli import commands as cli
from jaxgpt.cli.command_line import (
    COMMON_KEYS,
    choose_config,
    parse_command_line,
)
from jaxgpt.config import Config, UserError
from jaxgpt.runtime import device, distributed
from jaxgpt.runtime.config_file import load_config_file

SHAKESPEARE = str(ROOT / "configs" / "shakespeare.py")
HEAD = "from jaxgpt.config import Config\n\n"


def parse_with_notes(*argv: str, accelerator: bool = True) -> tuple[Config, list[str]]:
    """Parse a command line and choose the config variant, with or without an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "init_distributed", lambda *args: None)
        patch.setattr(device, "start", lambda *args, **keys: None)
        patch.setattr(device, "is_cpu", lambda: not accelerator)
        return choose_config(parse_command_line(argv))


def parse(*argv: str, accelerator: bool = True) -> Config:
    return parse_with_notes(*argv, accelerator=accelerator)[0]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a config file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine.py") -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(HEAD + text, encoding="utf-8")
        return name

    return write


# ---- mistakes in a config file ---------------------------------------------------------------
# (text of the file after the import, line of the mistake, words of the message)
MISTAKES = {
    "syntax": ("config = Config(\n    n_layer=3\n    n_head=2,\n)\n", "n_layer=3", "syntax"),
    "unclosed": ("x = 1\nconfig = Config(\n    n_layer=3,\n", "config = Config(", "never closed"),
    "name": ("depth = 3\nconfig = Config(n_layer=deep)\n", "config = Config(n_layer=deep)", "deep"),
    "import": ("import no_such_module\nconfig = Config()\n", "import no_such_module", "No module"),
    "value": ("config = Config(\n    n_layer=3,\n    dropout=1.5,  # high\n    bias=False,\n)\n",
              "dropout=1.5,  # high",
              "dropout=1.5: invalid value; expected a number from 0 to below 1"),
    "together": ("config = Config(\n    n_layer=3,\n    n_embd=100,\n    n_head=12,\n)\n",
                 "n_head=12,", "n_head=12: does not divide n_embd=100; "),
    "keyword": ("config = Config(\n    n_layer=3,\n    n_heads=2,\n)\n",
                "n_heads=2,", "n_heads: unknown key; try n_head"),
    "replace": ("config = Config().replace(\n    n_layer=2,\n    batchsize=3,\n)\n",
                "batchsize=3,", "batchsize: unknown key; try batch_size"),
    "function": ("def make(n):\n    return Config(\n        n_layer=n,\n    )\nconfig = make(-1)\n",
                 "n_layer=n,", "n_layer=-1: invalid value; expected a whole number from 0 to 2"),
    "elsewhere": ("import json\n\nconfig = json.loads('{')\n", "config = json.loads('{')", "JSON"),
    "lookup": ("config = {}['n_layer']\n", "config = {}['n_layer']", "KeyError: 'n_layer'"),
    "exit": ("import sys\nsys.exit(3)\n", "sys.exit(3)", "SystemExit: 3; expected a config file"),
    "lines": ("raise ValueError('one\\ntwo')\n", r"raise ValueError('one\ntwo')", "one two"),
    "accents": ("config = Config(\n    wandb_project='Molière',\n    seed=-1,\n)\n",
                "seed=-1,", "seed=-1: invalid value; expected a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_config_file_mistake_is_reported_with_line_number_and_text(write, kind):
    text, line, what = MISTAKES[kind]
    path = write(text)
    number = 1 + [s.strip() for s in Path(path).read_text("utf-8").splitlines()].index(line)
    message = refusal(parse, path)
    assert message.startswith(f"mine.py, line {number}: {line!r}: ")
    assert what in message


def test_mistake_in_an_imported_file_is_reported_at_that_file_and_line(write):
    write("sizes = {\n", "sizes.py")
    message = refusal(parse, write("from sizes import sizes\n"))
    assert re.match(r"\S*sizes.py, line 3: 'sizes = \{': ", message)


def test_config_file_imports_neighbouring_files_and_edits_take_effect(write, tmp_path):
    path = write("from base import config as base\nconfig = base.replace(seed=5)\n", "sub/mine.py")
    folders = list(sys.path)
    for n_layer in 3, 4:
        write(f"config = Config(n_layer={n_layer})\n", "sub/base.py")
        assert parse(path) == Config(n_layer=n_layer, seed=5)
    assert sys.path == folders
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("n_layer = 6\n", "config"),  # as nanoGPT's files are
        ("config = {'n_layer': 6}\n", "config"),
        ("config = Config\n", "config"),
        ("cpu_config = Config()\n", "config"),
        ("config = Config()\ncpu_config = {'n_layer': 6}\n", "cpu_config"),
    ],
)
def test_config_file_that_builds_no_config_is_rejected(write, text, name):
    said = refusal(parse, write(text))
    assert said.startswith("config='mine.py': ")
    assert said.endswith(f"; expected `{name} = Config(...)` in it")


NEAREST = {
    "configs/on.py": "configs/one.py",
    "more/two.py": "configs/more/two.py",
    "shakespear": "shakespeare",
    "configs/shakespeare.py": "shakespeare",
    "lecture/1": "lecture/1_bigram",
    "zzz": "shakespeare",
}


@pytest.mark.parametrize("typed", NEAREST)
def test_missing_config_file_is_rejected_with_the_nearest_name(write, typed):
    for name in "configs/one.py", "configs/more/two.py":
        write("config = Config()\n", name)
    said = refusal(parse, "--config", typed)
    assert said.startswith(f"config={typed!r}: no such file; expected a Python file, or ")
    assert said.endswith(f"; try {NEAREST[typed]}")


def test_shipped_configs_have_names_in_any_folder(write):
    for argv in ["shakespeare"], ["--config", "shakespeare"], ["--config=shakespeare"]:
        assert parse(*argv) == parse(SHAKESPEARE)
    small = parse("shakespeare", "--seed=3", accelerator=False)
    assert small == parse(SHAKESPEARE, "--seed=3", accelerator=False)
    assert small.config_file == "shakespeare"  # and not a path of this machine
    write("config = Config(n_layer=3)\n", "shakespeare")
    assert parse("shakespeare").n_layer == 3  # a file takes precedence


@pytest.mark.parametrize("name", ["lecture/1_bigram", "speedrun", "gpt2_xl"])
def test_shipped_configs_find_what_they_import_beside_folders_of_the_user(write, name):
    for folder in "examples", "configs":
        write("raise ValueError\n", f"{folder}/__init__.py")
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for m in sys.modules if m.split(".")[0] in ("examples", "configs")]:
            patch.delitem(sys.modules, module)
        patch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
        assert parse(name).max_iters > 0
        own = write("from configs.shakespeare import config\n", "mine.py")
        Path("configs/__init__.py").unlink()
        assert parse(own) == parse("shakespeare")


# ---- flags -----------------------------------------------------------------------------------
WAYS = [
    "--config mine.py --n_layer=2", "--config=mine.py --n_layer=2", "mine.py --n_layer=2",
    "mine.py --n_layer 2", "--n_layer 2 --config mine.py", "--n_layer=2 --config=mine.py",
]  # fmt: skip


@pytest.mark.parametrize("argv", WAYS)
def test_config_file_and_flags_parse_in_any_order_and_spelling(write, argv):
    write("config = Config(n_layer=5, n_head=4)\n")
    assert parse(*argv.split()) == Config(n_layer=2, n_head=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        (["--out_dir=a=b"], {"out_dir": "a=b"}),
        (["--out_dir", "a=b"], {"out_dir": "a=b"}),
        (["--out_dir=runs/no 1"], {"out_dir": "runs/no 1"}),
        (["--wandb_run_name=--seed"], {"wandb_run_name": "--seed"}),
        (["--wandb_run_name="], {}),
        (["--wandb_run_name", "compile"], {"wandb_run_name": "compile"}),
        (["--wandb_project", "backend=x"], {"wandb_project": "backend=x"}),
        (["--wandb_run_name=eval('1')"], {"wandb_run_name": "eval('1')"}),
        (["--mesh=data:2,fsdp:4"], {"mesh": "data:2,fsdp:4"}),
        (["--learning_rate=1", "--min_lr", "0"], {"learning_rate": 1.0, "min_lr": 0.0}),
        (["--learning_rate=3e-4"], {"learning_rate": 3e-4}),
        (["--bias=False", "--eval_only", "True"], {"bias": False, "eval_only": True}),
        (["--overwrite", "--n_layer=1"], {"overwrite": True, "n_layer": 1}),
        (["--n_layer=1", "--eval_only"], {"n_layer": 1, "eval_only": True}),
    ],
    ids=str,
)
def test_flag_sets_the_key_with_the_right_value_and_type(write, argv, keys):
    path = write("config = Config()\n")
    config = parse(path, *argv)
    assert config == Config(**keys)
    assert all(type(v) is type(getattr(config, k)) for k, v in keys.items())


@pytest.mark.slow
@settings(max_examples=15)
@given(configs())
def test_any_config_can_be_given_as_flags(config):
    flags = [f"--{key}={value}" for key, value in config.to_dict().items()]
    assert parse(SHAKESPEARE, *flags) == config


@pytest.mark.parametrize("end", ["=x", " x"])
@pytest.mark.parametrize(("flag", "why"), [("compile", "always compiles"), ("backend", "collect")])
def test_unsupported_nanogpt_flags_are_rejected_with_the_reason(flag, end, why):
    message = refusal(parse, SHAKESPEARE, *f"--{flag}{end}".split())
    assert message.startswith(f"--{flag}: ")
    assert why in message


def test_invalid_flag_value_is_rejected_by_the_config_checks():
    message = refusal(parse, SHAKESPEARE, "--dropout=2")
    assert message == "dropout=2.0: invalid value; expected a number from 0 to below 1"
    message = refusal(parse, SHAKESPEARE, "--n_head=7")
    assert message.startswith("n_head=7: does not divide n_embd=384; ")


@pytest.mark.parametrize("argv", [[], ["--n_layer=2"], ["--config="]], ids=str)
def test_missing_config_argument_is_rejected_with_an_example(argv):
    message = "--config: missing; expected a file or a name; try --config shakespeare"
    assert refusal(parse, *argv) == message


# (flags that do not parse, beginning of the message)
UNPARSED = [
    (["--n_layers=3"], "--n_layers: unknown key; try --n_layer"),
    (["--learnin_rate", "1"], "--learnin_rate: unknown key; try --learning_rate"),
    (["-n_layer=3"], "-n_layer: unknown key; try --n_layer"),
    (["--zzz"], "--zzz: unknown key; try --help"),
    (["--n_layer=1e1"], "n_layer='1e1': "),
    (["--n_layer="], "n_layer='': "),
    (["--learning_rate=fast"], "learning_rate='fast': "),
    (["--n_layer"], "--n_layer: has no value; expected --n_layer=VALUE"),
    (["--n_layer", "--seed=1"], "--n_layer: has no value; expected --n_layer=VALUE"),
    (["--bias=maybe"], "bias='maybe': "),
    (["--mlp=gelou"], "mlp='gelou': "),
    (["another.py"], "another.py: unexpected argument; expected --key=value; try --help"),
    (["--bias", "maybe"], "bias='maybe': "),
    (["--config"], "--config: has no value; expected --config=FILE"),
    (["--learning_rate=__import__('os').system('touch x')"], "learning_rate="),
    (["--max_iters", "__import__('os').system('touch x')"], "max_iters="),
    (["--bias=__import__('os').system('touch x')"], "bias="),
    (["--n_layer=9", "--n_layer=2"], "--n_layer: given 2 times (9, 2); expected one value; try "),
    (["--n_layer", "9", "--n-layer=2"], "--n_layer: given 2 times (9, 2); expected one value; "),
    (["--overwrite", "--overwrite"], "--overwrite: given 2 times (True, True); expected one "),
    (["--config=a.py", "--config", "b.py"], "--config: given 2 times (a.py, b.py); expected one "),
]


@pytest.mark.slow
@pytest.mark.parametrize(("argv", "begins"), UNPARSED, ids=str)
def test_unparsable_flags_are_rejected_in_one_line_and_execute_nothing(write, argv, begins):
    path = write("config = Config()\n")
    assert refusal(parse, path, *argv).startswith(begins)
    assert os.listdir() == ["mine.py"]


# command line that does not parse -> complete message
BAD_COMMANDS = {
    "eval --out=x": "--out: unknown key; try --out_dir",
    "sample --num_samples": "--num_samples: has no value; expected --num_samples=VALUE",
    "export": "--to: missing; expected a value; try jaxgpt export --help",
    "prepare": "--dataset: missing; expected a value; try jaxgpt prepare --help",
    "sample ''": "'': unexpected argument; expected --key=value; try --help",
    "prepare a b": "b: unexpected argument; expected --key=value; try --help",
    "sample --seed=1 --start=a --start=b --seed=2": "--seed: given 2 times (1, 2); expected one "
    "value; try --seed=2",
    "bench --repeats=3 --repeats 4": "--repeats: given 2 times (3, 4); expected one value; try "
    "--repeats=4",
    "ablate --features rope --features muon": "--features: given 2 times (rope, muon); expected it "
    "once; try --features rope muon",
    "plan --search --search": "--search: given 2 times (True, True); expected one value; try "
    "--search=True",
    "prepare a --name=../b": "name='../b': invalid value; expected a name for a folder",
    "ablate --seeds=0": "seeds=0: invalid value; expected a whole number from 1 to 2147483647",
    "plan --topolgy=x": "--topolgy: unknown key; try --topology",
}


@pytest.mark.parametrize("line", BAD_COMMANDS)
def test_invalid_command_arguments_are_rejected_with_a_suggestion(line):
    name, *argv = shlex.split(line)
    assert refusal(cli.COMMANDS[name], argv) == BAD_COMMANDS[line]


@pytest.mark.parametrize("columns", [None, "120"])
def test_parsing_restores_the_variable_columns(monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    parse("shakespeare")
    assert os.environ.get("COLUMNS") == columns


def test_parsed_overrides_hold_only_keys_set_by_flags(write):
    path = write("config = Config(n_layer=5)\n")
    parsed = parse_command_line([path, "--n_layer=5", "--min-lr", "0", "--overwrite"])
    assert parsed.overrides == {"n_layer": 5, "min_lr": 0.0, "overwrite": True}
    assert (parsed.config, parsed.cpu_config) == (Config(n_layer=5), None)
    assert parsed.config.config_file == path


# ---- CPU variant -----------------------------------------------------------------------------
VARIANTS = (
    "config = Config(n_layer=6, n_head=6, n_embd=384)\ncpu_config = config.replace(n_layer=4)\n"
)
NOTE = "no accelerator, so cpu_config is used: n_layer=4"


@pytest.mark.parametrize("accelerator", [True, False])
@pytest.mark.parametrize("flags", [[], ["--use_cpu_variant"], ["--use_cpu_variant=False"]], ids=str)
def test_cpu_variant_is_used_without_an_accelerator_unless_declined(write, accelerator, flags):
    path = write(VARIANTS)
    config, notes = parse_with_notes(path, *flags, accelerator=accelerator)
    is_small = not accelerator and flags != ["--use_cpu_variant=False"]
    assert config.n_layer == (4 if is_small else 6)
    assert notes == ([NOTE] if is_small else [])
    path = write(VARIANTS + "config = config.replace(use_cpu_variant=False)\n")
    assert parse(path, accelerator=False).n_layer == 6  # the file itself may decline


def test_flags_override_both_variants(write):
    path = write(VARIANTS + "cpu_config = cpu_config.replace(dropout=0.5)\n")
    for accelerator, dropout in (True, 0.0), (False, 0.5):
        config, notes = parse_with_notes(path, "--n_layer=6", "--seed=7", accelerator=accelerator)
        assert (config.n_layer, config.seed, config.dropout) == (6, 7, dropout)
        assert notes == ([] if accelerator else [NOTE.replace("n_layer=4", "dropout=0.5")])


def test_flags_are_validated_only_against_the_variant_in_use(write):
    """The width 256 is a multiple of cpu_config's 4 heads, but not of the 6 heads of config."""
    path = write("config = Config(n_head=6)\ncpu_config = config.replace(n_head=4)\n")
    assert parse(path, "--n_embd=256", accelerator=False).n_embd == 256
    message = refusal(parse, path, "--n_embd=256", accelerator=True)
    assert message.startswith("n_head=6: does not divide n_embd=256; ")


def test_file_without_cpu_variant_gives_the_same_config_on_any_device(write):
    path = write("config = Config(n_layer=5)\n")
    for accelerator in True, False:
        assert parse_with_notes(path, accelerator=accelerator) == (Config(n_layer=5), [])


def test_distributed_and_device_setup_receive_the_flag_values(write, monkeypatch):
    seen = []
    monkeypatch.setattr(distributed, "init_distributed", lambda *args: seen.append(args))
    monkeypatch.setattr(device, "start", lambda *args, **keys: seen.append((*args, keys)))
    flags = ["--device=cpu", "--dtype=float64", "--coordinator=a:1", "--num_processes=2"]
    choose_config(parse_command_line([write(VARIANTS), *flags, "--process_id=1"]))
    assert seen == [("a:1", 2, 1, "cpu"), ("cpu", {"float64": True})]


# ---- user-defined config classes -------------------------------------------------------------
OWN = """
from dataclasses import dataclass
from typing import Annotated

from jaxgpt.config import Range


@dataclass(frozen=True, kw_only=True)
class WideConfig(Config):
    \"\"\"A model of mine.\"\"\"

    width: Annotated[int, Range(1, 64)] = 8
    \"\"\"Width of
    every layer.\"\"\"
    gated: bool = False
    pairs: int = 1


config = WideConfig(width=9)
cpu_config = config.replace(width=4)
"""


def test_config_subclass_keys_become_flags_with_help(write, capsys):
    path = write(OWN)
    config = parse(path, "--width=12", "--gated", "--n_layer=3", "--pairs=2")
    assert type(config).__name__ == "WideConfig"
    assert (config.width, config.gated, config.n_layer) == (12, True, 3)
    assert config.pairs == 2  # an old name of a flag of bench
    assert parse(path, "--seed=2", accelerator=False).width == 4
    message = "width=65: invalid value; expected a whole number from 1 to 64"
    assert refusal(parse, path, "--width=65") == message
    assert exit_code(parse, "--help", path) == 0
    capsys.readouterr()
    assert exit_code(parse, path, "--help") == 0
    words = " ".join(re.sub(r"[│|]", " ", capsys.readouterr().out).split())
    assert "wide options" in words
    assert "A model of mine." in words
    assert "--width INT Width of every layer. (default: 9)" in words
    assert "--gated {True,False} (default: False)" in words


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_fits_80_columns(name, capsys):
    assert exit_code(cli.COMMANDS[name], ["--help"]) == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: ")
    assert max(map(len, lines)) <= 80


# The words of a command line -> some of its completions.
COMPLETIONS = {
    "": "train sample prepare eval export report bench ablate plan",
    "report --prom": "--prompt",
    "tr": "train",
    "train --n_l": "--n_layer",
    "train --conf": "--config",
    "sample --init": "--init_from",
    "train --mlp ": "gelu gelu_tanh relu relu2 swiglu",
    "plan --topo": "--topology",
    "plan --n_l": "--n_layer",
    "ablate --feat": "--features",
}
COMPLETE = """
complete() { function=${@: -2:1}; }  # complete [-o default] -F FUNCTION NAME
source ./completion.bash
while IFS= read -r line; do
    COMP_WORDS=(jaxgpt $line) COMPREPLY=()
    if [ -z "${line##* }" ]; then COMP_WORDS+=(""); fi
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE="jaxgpt $line"
    $function
    echo ${COMPREPLY[@]}
done
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", "train"])
def test_bash_completes_commands_flags_and_values(tmp_path, monkeypatch, capsys, command):
    argv = ["jaxgpt", *command.split(), "--tyro-print-completion", "bash"]
    monkeypatch.setattr(sys, "argv", argv)
    cli.main()
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)
    lines = "".join(f"{line}\n" for line in COMPLETIONS)
    run = partial(subprocess.run, text=True, capture_output=True, check=True, cwd=tmp_path)
    said = run(["bash", "-c", COMPLETE], input=lines).stdout.splitlines()
    for line, found in zip(COMPLETIONS, said, strict=True):
        assert set(COMPLETIONS[line].split()) <= set(found.split()), line


def test_completion_for_an_unknown_shell_is_rejected(monkeypatch, capsys):
    for shell in ["fish"], []:
        monkeypatch.setattr(sys, "argv", ["jaxgpt", "--tyro-print-completion", *shell])
        assert exit_code(cli.main) == 2
        assert "unknown shell; expected one of bash, zsh" in capsys.readouterr().err


# ---- nanoGPT's commands and the shipped configs ----------------------------------------------
# First part: nanoGPT's config/train_shakespeare_char.py over the defaults of nanoGPT's train.py.
# Second part: what nanoGPT's model.py and train.py do without a key.
BABY_GPT = """
--eval_interval=250 --eval_iters=200 --log_interval=10 --always_save_checkpoint=False
--eval_only=False --init_from=scratch --wandb_log=False --wandb_project=shakespeare-char
--dataset=shakespeare_char --gradient_accumulation_steps=1 --batch_size=64 --block_size=256
--n_layer=6 --n_head=6 --n_embd=384 --dropout=0.2 --bias=False --learning_rate=1e-3
--max_iters=5000 --lr_decay_iters=5000 --min_lr=1e-4 --beta1=0.9 --beta2=0.99 --weight_decay=0.1
--grad_clip=1.0 --decay_lr=True --warmup_iters=100 --seed=1337

--vocab_size=0 --n_kv_head=0 --mlp_dim=0 --norm=layernorm --norm_position=pre --position=learned
--norm_gain=True --mlp=gelu --tie_embeddings=True --qk_norm=False --logit_softcap=0
--sliding_window=0 --causal=True --value_residual=False --document_mask=False --eot_id=-1
--attention_dropout=True --align_documents=False
--zero_init_projections=False --optimizer=adamw --lr_schedule=cosine --batch_tokens=0
"""
# These keys do not change the result: files, logs, hardware, and features that are off.
FREE = """
out_dir data_dir overwrite save_interval keep_checkpoints sample_every tensorboard wandb_run_name
data_on_device device use_cpu_variant dtype mesh attention xla deterministic remat
scan_layers shard_optimizer steps_per_call coordinator num_processes process_id max_nonfinite_steps
profile report skip_loss_spikes spike_window
early_stopping_patience target_val_loss freeze decay_fraction muon_polynomial
digits train_digits random_offset working reverse_digits
momentum_warmup_iters cautious_weight_decay muon_iterations muon_per_head
"""


def test_shakespeare_config_equals_nanogpt_baby_gpt_in_keys_that_affect_results():
    keys = {flag.split("=")[0].removeprefix("--") for flag in BABY_GPT.split()}
    assert keys | set(FREE.split()) == set(HINTS)
    parsed = parse_command_line([SHAKESPEARE, *BABY_GPT.split()])
    assert parsed.config.replace(**parsed.overrides) == parsed.config


# This is the laptop command of nanoGPT's README, with the name of our config file.
LAPTOP = """
configs/shakespeare.py --device=cpu --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12
--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
"""


def test_cpu_variant_equals_nanogpt_laptop_command_except_learning_rate(monkeypatch):
    monkeypatch.chdir(ROOT)
    path, *flags = LAPTOP.split()
    ours = parse(path, "--device=cpu", "--log_interval=1", accelerator=False)
    for accelerator in True, False:
        typed = parse(path, *flags, accelerator=accelerator)
        assert ours == typed.replace(learning_rate=ours.learning_rate)
        for flag in flags:
            key, value = flag.removeprefix("--").split("=")
            assert str(typed.to_dict()[key]) == value


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: p.name)
def test_every_shipped_config_file_loads(path):
    assert isinstance(load_config_file(str(path))["config"], Config)


# ---- exit codes ------------------------------------------------------------------------------
MISTAKE = "n_layer=-1: must be at least 0"
ENDS = {None: None, 0: 0, 143: 143, KeyboardInterrupt(): 130, UserError(MISTAKE): 2}


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_exit_code_follows_the_return_value_or_exception(capsys, end):
    def command(argv):
        if isinstance(end, BaseException):
            raise end
        return end

    assert exit_code(cli.run, command, []) == ENDS[end]
    told = capsys.readouterr()
    assert told.err == (f"error: {MISTAKE}\n" if isinstance(end, UserError) else "")
    assert not told.out


def test_closed_output_pipe_exits_with_code_141_without_traceback():
    code = "from jaxgpt.cli.commands import run; run(lambda _: [print(n) for n in range(10**5)])"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe) as talk:
        assert talk.stdout.readline() == b"0\n"
        talk.stdout.close()
        assert talk.stderr.read() == b""
    assert talk.returncode == 141


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ENOTDIR])
def test_path_that_cannot_be_used_is_told_in_one_line(capsys, number):
    def command(argv):
        raise OSError(number, os.strerror(number), "some/file")

    assert exit_code(cli.run, command, []) == 2
    assert re.fullmatch(r"error: some/file: [a-z ]+; expected a path .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, AssertionError])
def test_unexpected_errors_propagate_unchanged(error):
    def command(argv):
        raise error("ours")

    with pytest.raises(error, match="ours"):
        cli.run(command, [])


def test_command_receives_the_process_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "mine.py", "--n_layer=2"])
    seen = []
    assert exit_code(cli.run, seen.append) is None
    assert seen == [["mine.py", "--n_layer=2"]]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]], ids=str)
def test_console_script_lists_the_available_commands(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["jaxgpt", *argv])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert set(cli.COMMANDS) <= {line.split()[0] for line in lines if line.startswith("  ")}
    assert max(map(len, lines)) <= 80


def test_unknown_command_is_rejected_with_the_known_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxgpt", "fly"])
    assert exit_code(cli.main) == 2
    message = "error: fly: unknown command; expected one of train, sample, prepare, eval, "
    assert capsys.readouterr().err.startswith(message)


def test_python_m_jaxgpt_prints_the_version():
    command = [sys.executable, "-m", "jaxgpt", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"jaxgpt {__version__}\n"


@pytest.mark.parametrize(
    ("args_type", "line", "keys"),
    [
        (cli.SampleArgs, "--start a --start=--b --stop=c", {"start": ("a", "--b"), "stop": ("c",)}),
        (cli.SampleArgs, "--interactive --temperature -0", {"interactive": True, "temperature": 0}),
        (cli.AblateArgs, "--features a b --seeds=2", {"features": ("a", "b"), "seeds": 2}),
        (cli.PrepareArgs, "--data-dir=d verse.txt", {"dataset": "verse.txt", "data_dir": "d"}),
    ],
    ids=str,
)  # fmt: skip
def test_command_flags_fill_the_arguments_dataclass(args_type, line, keys):
    assert cli.parse(args_type, line.split(), "jaxgpt") == args_type(**keys)


def test_plan_accepts_plan_flags_and_config_flags(write, monkeypatch):
    plan = pytest.importorskip("jaxgpt.tools.plan")
    seen = []
    monkeypatch.setattr(plan, "run", lambda *args: seen.append(args))
    path = write(VARIANTS)
    assert cli.plan([path, "--topology=h100:8", "--n_layer", "3", "--search", "--breakdown"]) == 1
    ((config, topology, search, _, breakdown, _),) = seen
    assert (config.n_layer, topology, search, breakdown) == (3, "h100:8", True, True)


# ---- help ------------------------------------------------------------------------------------
RUN = """
import json, sys
from jaxgpt.cli import commands as cli
try:
    cli.run(cli.COMMANDS[sys.argv[1]], sys.argv[2:])
finally:
    print(json.dumps(sorted(sys.modules)), file=open("modules.json", "w"))
"""
HEAVY = {"jax", "flax", "orbax", "numpy", "matplotlib"}


def run_process(folder: Path, *argv: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run a command in a separate process; return the output and the imported modules."""
    command, env = [sys.executable, "-c", RUN, *argv], CHILD_ENV | {"COLUMNS": "100"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done, set(json.loads(Path(folder, "modules.json").read_text()))


def test_help_lists_every_key_with_the_file_value_without_importing_jax(write, tmp_path):
    path = write("config = Config(n_layer=5, n_head=4, learning_rate=3e-3, bias=False)\n")
    done, modules = run_process(tmp_path, "train", path, "--help")
    assert (done.returncode, done.stderr, HEAVY & modules) == (0, "", set())
    assert max(map(len, done.stdout.splitlines())) <= 80
    first_group = done.stdout.split("╰")[0]
    assert re.findall(r"--(\w+)", first_group.partition("--help ")[2]) == list(COMMON_KEYS)
    text = re.sub(r"[│\s]+", " ", done.stdout)
    for key, value in load_config_file(path)["config"].to_dict().items():
        found = re.search(rf"--{key} .*?\(default: (.*?)\)", text)
        assert found, key
        assert text.count(f"--{key} ") == 1
        assert found[1].strip("'\"") == str(value), key


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train", "nope.py"], r"error: config='nope.py': no such file; expected .*\n"),
        (["train", "mine.py", "--dropout=2"], r"error: dropout=2.0: invalid value; .*\n"),
        (["train", "mine.py", "--n_layers=2"], r"error: --n_layers: unknown key; try --n_layer\n"),
        (["sample", "--temperature=-1"], r"error: temperature=-1.0: invalid value; .*\n"),
    ],
    ids=" ".join,
)
def test_user_errors_are_printed_without_traceback_or_jax_import(write, tmp_path, argv, told):
    write("config = Config()\n")
    done, modules = run_process(tmp_path, *argv)
    assert (done.returncode, HEAVY & modules) == (2, set())
    assert re.fullmatch(told, done.stderr)
    assert "Traceback" not in done.stderr


def test_prepare_writes_a_dataset(tmp_path):
    (tmp_path / "verse.txt").write_bytes(b"to be or not to be\n" * 9)
    argv = [str(tmp_path / "verse.txt"), f"--data_dir={tmp_path / 'data'}"]
    assert exit_code(cli.run, cli.prepare, argv) is None
    assert list(tmp_path.glob("data/*")) == [tmp_path / "data/verse"]
