"""Fill docs/config.md with the tables of config keys, when mkdocs builds the site.

The tables come from the dataclasses of jaxgpt/config.py, so they cannot differ from the code.
"""

import typing
from typing import Any, Literal

from jaxgpt import config as keys
from jaxgpt.cli.command_line import key_help

MARK = "<!-- config keys -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark in a page by the tables (a hook of mkdocs)."""
    return markdown.replace(MARK, config_tables())


def config_tables() -> str:
    """Return one Markdown section with a table for each group of keys."""
    types = keys.key_types(keys.Config)
    defaults = keys.Config().to_dict()
    sections = []
    for group in keys.Config.__bases__:
        help_texts = key_help(group)
        title = group.__name__.removesuffix("Config")
        lines = [f"## {title}", "", group.__doc__ or "", ""]
        lines += ["| Key | Default | Allowed | Meaning |", "|---|---|---|---|"]
        for key in keys.key_types(group):
            cells = [f"`{key}`", f"`{defaults[key]!r}`", allowed(types[key]), help_texts[key]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def allowed(hint: Any) -> str:
    """Describe the values that a key's annotation allows."""
    kind, *notes = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    nouns = {int: "whole number", float: "number", bool: "`True`, `False`", str: "text"}
    rules = [str(note) for note in notes if isinstance(note, keys.Range | keys.Pattern)]
    return rules[0] if kind is str and rules else " ".join([nouns[kind], *rules])
