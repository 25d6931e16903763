"""Three blocks on a residual stream, each branch with a map back to it."""

from pathlib import Path

from jaxgpt.command_line import load

before = load(str(Path(__file__).with_name("5_feed_forward.py")))["config"]
config = before.replace(
    out_dir="out/lecture/6_residuals",
    n_layer=3,
    residual=True,
    out_projection=True,
    n_inner=0,  # four times n_embd
)
