"""Train a GPT that adds, subtracts, multiplies and divides: "12*34=" and the answer, units first.

Division drops the remainder. docs/exercises.md shows what the model learns.
"""

from configs.adder import config as adder

config = adder.replace(
    out_dir="out/calculator",
    dataset="calculator",
    digits=2,
    always_save_checkpoint=False,
    block_size=10,
    n_layer=3,
    n_embd=96,
    learning_rate=3e-3,
    max_iters=4000,
)
