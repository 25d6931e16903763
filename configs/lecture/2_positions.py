"""The bigram, told where in the context it stands: a learned vector a position."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("1_bigram.py")))["config"]
config = before.replace(
    out_dir="out/lecture/2_positions",
    position="learned",
)
