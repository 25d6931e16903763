"""Test README and docs: commands parse, help commands run, named and linked files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from jaxgpt.cli import commands as cli

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Programs that are not ours; the tests check ours only.
OTHER_PROGRAMS = {
    "/usr/bin/time", "[", "awk", "break", "cat", "cd", "cp", "curl", "do", "done", "echo",
    "exit", "export", "for", "gcloud", "git", "head", "jupyter", "kill", "ls", "mkdir",
    "mkdocs", "mpirun", "npm", "pip", "pytest", "rm", "ruff", "sbatch", "scontrol", "scp",
    "source", "srun", "status=$?", "tail", "tar", "tensorboard", "truncate", "unshare", "unzip",
    "wget", "while",
}  # fmt: skip


def shell_commands(markdown: str) -> list[list[str]]:
    """List the commands of a page's shell blocks, each as its words."""
    commands = []
    for language, block in FENCE.findall(markdown):
        assert language, "a block without a language"
        if language != "bash":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command: list[str] = []
            for word in [*words, ";"]:
                if word not in ("&&", "||", "|", ";", "&"):
                    command.append(word)
                else:
                    commands.append(without_variables(command))
                    command = []
    return [command for command in commands if command]


def without_variables(words: list[str]) -> list[str]:
    """Drop the environment variables before a command."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


COMMANDS = {
    f"{page.name}: {' '.join(words)}": words
    for page in PAGES
    for words in shell_commands(page.read_text(encoding="utf-8"))
}


def our_command(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the name and the arguments of a command of jaxgpt, or None for another program."""
    words = [word for word in words if word not in ("<", ">", "2>&1", "&")]
    match words:
        case ["jaxgpt", name, *argv]:
            return name, argv
        case ["python", "-m", "jaxgpt", name, *argv]:
            return name, argv
        case ["python", "train.py", *argv]:
            return "train", argv
        case ["python", "sample.py", *argv]:
            return "sample", argv
        case ["srun", *rest] if "python" in rest:
            return our_command(rest[rest.index("python") :])
    return None


def write_own_model(folder: Path) -> str:
    """Write the model of docs/extending.md to my_model.py; return the file's path."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    code = next(block for language, block in FENCE.findall(page) if language == "python")
    (folder / "my_model.py").write_text(code, encoding="utf-8")
    return str(folder / "my_model.py")


SHORT_FLAGS = {"--help", "--version", "--tyro-print-completion"}  # that print something


class Parsed(Exception):
    """Raised where a command would begin to work."""


def parse_only(monkeypatch) -> None:
    """Let every command end once its command line is parsed and checked."""

    def stop_after(function):
        def parse(*args, **keys):
            function(*args, **keys)
            raise Parsed

        return parse

    monkeypatch.setattr(cli, "parse", stop_after(cli.parse))
    monkeypatch.setattr(cli, "parse_command_line", stop_after(cli.parse_command_line))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_documented_command_parses(name, monkeypatch, tmp_path):
    words = COMMANDS[name]
    command = our_command(words)
    monkeypatch.chdir(ROOT)
    if command is None:
        if words[0] == "python":
            assert words[1] in ("-c", "-m") or (ROOT / words[1]).is_file()
        else:
            assert words[0] in OTHER_PROGRAMS
        return
    command_name, argv = command
    if SHORT_FLAGS & {command_name, *argv}:
        return  # the next test runs it
    if "my_model.py" in argv:
        model = write_own_model(tmp_path)
        argv = [model if word == "my_model.py" else word for word in argv]
    parse_only(monkeypatch)
    with pytest.raises(Parsed):
        cli.COMMANDS[command_name](argv)


SHORT = [words for words in COMMANDS.values() if SHORT_FLAGS & set(words)]


@pytest.mark.slow
@pytest.mark.parametrize("words", SHORT, ids=" ".join)
def test_every_documented_help_command_runs(words, tmp_path):
    name, argv = our_command(words)
    if "my_model.py" in argv:
        argv[argv.index("my_model.py")] = write_own_model(tmp_path)
    command = [sys.executable, "-m", "jaxgpt", name, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout


LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_points_to_an_existing_file(page):
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


NAMED = re.compile(r"`((?:jaxgpt|configs|examples|tests|docs)/[\w./-]+\.(?:py|md|png|npz))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_in_a_page_exists(page):
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        if "…" not in name and not Path(name).stem.isupper() and Path(name).stem != "X":
            assert (ROOT / name).exists(), name
