"""Four heads of width 8, concatenated."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("3_one_head.py")))["config"]
config = before.replace(
    out_dir="out/lecture/4_heads",
    n_head=4,
)
