"""After the heads have talked, each place thinks for itself: a small ReLU network."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("4_heads.py")))["config"]
config = before.replace(
    out_dir="out/lecture/5_feed_forward",
    mlp="relu",
    mlp_dim=32,  # the lecture widens it to four times n_embd only in the next stage
)
