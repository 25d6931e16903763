"""A GPT that adds, subtracts, multiplies and divides: "12*34=" and the answer, units first.

A quotient is a whole number; what remains is dropped. docs/exercises.md says what it learns.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/calculator",
    dataset="calculator",
    digits=2,
    eval_interval=500,
    eval_iters=4,
    log_interval=100,
    always_save_checkpoint=False,
    batch_size=128,
    gradient_accumulation_steps=1,
    steps_per_dispatch=10,
    block_size=10,
    n_layer=3,
    n_head=4,
    n_embd=96,
    bias=False,
    learning_rate=3e-3,
    min_lr=1e-5,
    warmup_iters=100,
    max_iters=4000,
    beta2=0.98,
)
