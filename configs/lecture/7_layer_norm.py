"""LayerNorm before each branch and before the output map."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("6_residuals.py")))["config"]
config = before.replace(
    out_dir="out/lecture/7_layer_norm",
    norm="layernorm",
)
