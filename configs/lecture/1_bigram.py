"""The lecture's first stage: a token's own 32 numbers are mapped to the odds of what follows it.

Every later stage is the one before it and a few keys.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/lecture/1_bigram",
    eval_interval=500,
    eval_iters=200,
    log_interval=100,
    always_save_checkpoint=False,
    dataset="shakespeare_char",
    gradient_accumulation_steps=1,
    batch_size=32,
    block_size=8,
    n_layer=0,
    n_embd=32,
    n_head=1,
    norm="none",
    position="none",
    tie_embeddings=False,
    head_bias=True,
    init="torch",  # from here on: what PyTorch does unless told otherwise
    learning_rate=1e-3,
    decay_lr=False,
    max_iters=5000,
    weight_decay=0.01,
    decay_all=True,
    beta2=0.999,
    grad_clip=0.0,
    steps_per_call=100,  # they are short
)
