"""The shape of Llama 2 70B (Touvron et al. 2023), to plan with."""

from pathlib import Path

from jaxgpt.cli.command_line import load

config = load(str(Path(__file__).with_name("llama_7b_shape.py")))["config"]
config = config.replace(
    out_dir="out/llama_70b",
    n_layer=80,
    n_head=64,
    n_kv_head=8,  # grouped heads
    n_embd=8192,
    mlp_dim=28_672,
    learning_rate=1.5e-4,
    min_lr=1.5e-5,
)
