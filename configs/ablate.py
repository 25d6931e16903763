"""Define the baseline of docs/menu.md, a GPT-2 small enough to train dozens of times.

Used by `jaxgpt ablate`.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/ablate",
    dataset="shakespeare_char",
    gradient_accumulation_steps=1,
    batch_size=8,
    block_size=64,
    n_layer=3,
    n_head=4,
    n_embd=64,
    learning_rate=8e-3,
    min_lr=1e-4,
    beta2=0.99,
    warmup_iters=50,
    max_iters=500,
    eval_interval=100_000,  # evaluate only at the end, on the whole validation split
    eval_iters=1,
    log_interval=50,
)
