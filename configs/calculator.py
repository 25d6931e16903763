"""Train a GPT to add, subtract, multiply and divide by writing down its working.

`jaxgpt eval --out_dir=out/calculator` counts its correct answers to held-out problems.
docs/exercises.md describes the data and the results.
"""

from configs.adder import config as adder

config = adder.replace(
    out_dir="out/calculator",
    dataset="calculator",
    working=True,
    always_save_checkpoint=False,
    block_size=98,
    n_layer=3,
    n_head=3,
    n_embd=96,
    optimizer="muon",
    learning_rate=1e-2,
    max_iters=1600,
)
