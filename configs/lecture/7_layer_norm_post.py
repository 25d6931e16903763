"""LayerNorm where the paper of 2017 has it: after each addition, and none at the end."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("7_layer_norm.py")))["config"]
config = before.replace(
    out_dir="out/lecture/7_layer_norm_post",
    norm_position="post",
)
