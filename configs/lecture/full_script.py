"""A GPT as one PyTorch script of the lecture's time writes it, slip included, key by key.

`tests/golden/make_full_script.py` holds such a script; a test compares 20 steps with it.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/lecture/full_script",
    eval_interval=500,
    eval_iters=200,
    log_interval=100,
    always_save_checkpoint=False,
    dataset="shakespeare_char",
    gradient_accumulation_steps=1,
    batch_size=64,
    block_size=256,
    n_layer=4,
    n_head=4,
    n_embd=384,
    dropout=0.2,
    embed_dropout=False,
    qkv_bias=False,
    head_bias=True,
    tie_embeddings=False,
    mlp="relu",
    out_projection=False,  # heads are concatenated, and that is all
    score_scale="embedding",  # C**-0.5 with C = 384, where a head is 96 wide
    init="torch",
    learning_rate=3e-4,
    decay_lr=False,
    max_iters=5000,
    weight_decay=0.01,  # from here on: torch.optim.AdamW, left at its defaults
    decay_all=True,
    beta1=0.9,
    beta2=0.999,
    grad_clip=0.0,
)

on_cpu = config.replace(
    eval_iters=20,
    eval_interval=250,
    batch_size=16,
    block_size=64,
    n_embd=64,
    dropout=0.0,  # so small a network, trained so briefly, does not overfit
    learning_rate=1e-3,
    max_iters=1000,
)
