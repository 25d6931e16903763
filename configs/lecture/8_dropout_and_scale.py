"""The lecture's last stage, in full for an accelerator: dropout, and sizes as in nanoGPT."""

from pathlib import Path

from jaxgpt.cli.command_line import load

before = load(str(Path(__file__).with_name("7_layer_norm.py")))["config"]
config = before.replace(
    out_dir="out/lecture/8_dropout_and_scale",
    batch_size=64,
    block_size=256,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    embed_dropout=False,
    learning_rate=3e-4,
    steps_per_call=0,
)

on_cpu = config.replace(
    eval_iters=20,
    batch_size=16,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.1,
    learning_rate=1e-3,
    max_iters=2000,
)
