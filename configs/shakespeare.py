"""Train a GPT on Shakespeare, character by character, as nanoGPT's train_shakespeare_char does.

`config` is the baby GPT, for an accelerator. Without an accelerator `cpu_config` runs. It is the
recipe that nanoGPT's README gives for a laptop, with a higher learning rate.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/shakespeare",
    eval_interval=250,  # often, because the model overfits this small text quickly
    eval_iters=200,
    log_interval=10,
    always_save_checkpoint=False,  # the model will overfit, so save only improvements
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
    learning_rate=1e-3,  # small networks allow a high learning rate
    max_iters=5000,
    lr_decay_iters=5000,
    min_lr=1e-4,
    beta2=0.99,  # a longer average, because there are few tokens per step
    warmup_iters=100,
    wandb_project="shakespeare-char",
)

cpu_config = config.replace(
    eval_iters=20,
    batch_size=12,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.0,
    learning_rate=4e-3,  # this network is even smaller; nanoGPT uses 1e-3
    max_iters=2000,
    lr_decay_iters=2000,
)
