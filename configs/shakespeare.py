"""A GPT that writes Shakespeare, one character at a time: nanoGPT's train_shakespeare_char.

In full it is the baby GPT, for an accelerator. Without one the variant for a CPU runs, which is
the recipe that nanoGPT's README gives for a laptop.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/shakespeare",
    eval_interval=250,  # often, since this small text is soon known by heart
    eval_iters=200,
    log_interval=10,
    always_save_checkpoint=False,  # it will overfit: keep what validates best
    dataset="shakespeare_char",
    gradient_accumulation_steps=1,
    batch_size=64,
    block_size=256,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    bias=False,
    mlp="gelu",
    learning_rate=1e-3,  # a small network can take a higher one
    max_iters=5000,
    lr_decay_iters=5000,
    min_lr=1e-4,
    beta2=0.99,  # a longer memory, since a step sees few tokens
    warmup_iters=100,
    wandb_project="shakespeare-char",
)

on_cpu = config.replace(
    eval_iters=20,
    batch_size=12,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
    learning_rate=4e-3,  # a smaller network takes a higher one still; nanoGPT stays at 1e-3
    max_iters=2000,
    lr_decay_iters=2000,
)
