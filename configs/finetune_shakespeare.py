"""Finetune GPT-2 XL on Shakespeare, as nanoGPT's config of this name does.

A smaller GPT-2 needs less memory: --init_from=gpt2, gpt2-medium or gpt2-large.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out-shakespeare",
    init_from="gpt2-xl",
    eval_interval=5,
    eval_iters=40,
    always_save_checkpoint=False,  # the model will overfit, so save only improvements
    dataset="shakespeare",
    batch_size=1,
    gradient_accumulation_steps=32,  # x 1024 tokens: about nine steps per epoch
    max_iters=20,
    learning_rate=3e-5,
    decay_lr=False,
    wandb_project="shakespeare",
)
