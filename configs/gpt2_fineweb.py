"""Train GPT-2 124M on 10 billion tokens of FineWeb-Edu: build-nanogpt's recipe, one epoch.

Run `jaxgpt prepare fineweb_edu` first. Each step trains on 512 sequences (524,288 tokens), on any
number of devices. docs/reproduction.md shows the expected loss and the cost.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/gpt2_fineweb",
    eval_interval=250,
    eval_iters=20,
    log_interval=10,
    dataset="fineweb_edu",
    batch_size=32,  # largest number of sequences that a device processes at a time
    batch_tokens=524_288,
    block_size=1024,
    n_layer=12,
    n_head=12,
    n_embd=768,
    learning_rate=6e-4,
    max_iters=19_073,  # 10 billion tokens
    lr_decay_iters=19_073,
    min_lr=6e-5,
    warmup_iters=715,  # 375 million tokens, as for GPT-3
    wandb_project="fineweb",
    wandb_run_name="gpt2-124M",
)
