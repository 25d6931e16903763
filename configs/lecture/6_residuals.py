"""Three blocks on a residual stream, each branch with a map back to it."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("5_feed_forward.py")))["config"]
config = before.replace(
    out_dir="out/lecture/6_residuals",
    n_layer=3,
    residual=True,
    out_projection=True,
    mlp_dim=0,  # four times n_embd
)
