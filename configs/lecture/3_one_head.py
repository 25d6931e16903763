"""One head of self-attention, 32 wide, in place of the token itself."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("2_positions.py")))["config"]
config = before.replace(
    out_dir="out/lecture/3_one_head",
    n_layer=1,
    mlp="none",
    residual=False,
    out_projection=False,
    qkv_bias=False,
    score_scale="embedding",  # the lecture's slip; with one head it is the right width
)
