"""README and docs: every command parses, every short one runs, every file that they name exists."""

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
    "cd", "cp", "export", "git", "kill", "ls", "mkdir", "mkdocs", "mpirun", "pip", "pytest",
    "rm", "ruff", "scp", "srun", "sbatch", "tail", "tar", "tensorboard", "unzip", "wget", "gcloud",
}  # fmt: skip


def shell_commands(markdown: str) -> list[list[str]]:
    """List the commands of a page's shell blocks, each as its words."""
    commands = []
    for language, block in FENCE.findall(markdown):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r" && | \| |; ", line):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]  # variables of the environment
                if words:
                    commands.append(words)
    return commands


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
def test_every_printed_command_parses(name, monkeypatch):
    words = COMMANDS[name]
    command = our_command(words)
    monkeypatch.chdir(ROOT)
    if command is None:
        if words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1] == "-c"
        else:
            assert words[0] in OTHER_PROGRAMS
        return
    command_name, argv = command
    if {"--help", "--version"} & {command_name, *argv}:
        return  # the next test runs it
    parse_only(monkeypatch)
    with pytest.raises(Parsed):
        cli.COMMANDS[command_name](argv)


SHORT = [words for words in COMMANDS.values() if {"--help", "--version"} & set(words)]


@pytest.mark.parametrize("words", SHORT, ids=" ".join)
def test_every_printed_command_for_help_runs(words):
    name, argv = our_command(words)
    command = [sys.executable, "-m", "jaxgpt", name, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout


LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


NAMED = re.compile(r"`((?:jaxgpt|configs|examples|tests|docs)/[\w./-]+\.(?:py|md|png|npz))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        if "…" not in name and not Path(name).stem.isupper() and Path(name).stem != "X":
            assert (ROOT / name).exists(), name
