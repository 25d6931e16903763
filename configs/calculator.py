"""A GPT that adds, subtracts, multiplies and divides: "12*34=" and the answer, units first.

A quotient is a whole number; what remains is dropped. docs/exercises.md says what it learns.
"""

from pathlib import Path

from jaxgpt.cli.command_line import load

config = load(str(Path(__file__).with_name("adder.py")))["config"]
config = config.replace(
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
