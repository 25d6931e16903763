"""Train GPT-2 124M on OpenWebText, as nanoGPT's train_gpt2 does on eight A100s.

Each step trains on 480 sequences (491,520 tokens), on any number of devices.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/gpt2",
    eval_interval=1000,
    eval_iters=200,
    log_interval=10,
    dataset="openwebtext",
    batch_size=12,  # largest number of sequences that a device processes at a time
    gradient_accumulation_steps=40,  # 5 for each of nanoGPT's eight GPUs
    block_size=1024,
    n_layer=12,
    n_head=12,
    n_embd=768,
    bias=False,
    mlp="gelu",
    learning_rate=6e-4,
    max_iters=600_000,  # 295 billion tokens
    lr_decay_iters=600_000,
    min_lr=6e-5,
    warmup_iters=2000,
    wandb_project="owt",
    wandb_run_name="gpt2-124M",
)
