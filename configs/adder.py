"""Train a GPT to add (exercise 2 of the lecture): it reads "123+456=" and writes the sum.

`jaxgpt eval --out_dir=out/adder` counts its correct answers to held-out sums. docs/exercises.md
describes the data and the results.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/adder",
    dataset="adder",
    digits=3,
    eval_interval=500,
    eval_iters=4,
    log_interval=100,
    batch_size=128,
    gradient_accumulation_steps=1,
    steps_per_call=10,
    block_size=12,
    n_layer=2,
    n_head=4,
    n_embd=64,
    bias=False,
    learning_rate=5e-3,
    min_lr=1e-5,
    warmup_iters=100,
    max_iters=2000,
    beta2=0.98,
)
