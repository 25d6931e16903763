"""Train the GPT of a PyTorch script from the time of the lecture, including its mistake.

`tests/golden/make_full_script.py` is such a script, and a test compares 20 steps with it. The
mistake is `attention_scale`; docs/lecture.md measures what it costs.
"""

from examples.lecture.config import LectureConfig

config = LectureConfig(
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
    lm_head_bias=True,
    tie_embeddings=False,
    mlp="relu",
    attention_output_proj=False,  # the heads are only concatenated
    attention_scale="embedding",  # the script divides by 384**0.5, but a head is 96 wide
    init="torch",
    learning_rate=3e-4,
    decay_lr=False,
    max_iters=5000,
    weight_decay=0.01,  # from here on, the defaults of torch.optim.AdamW
    decay_bias_and_norm=True,
    beta1=0.9,
    beta2=0.999,
    grad_clip=0.0,
)

cpu_config = config.replace(
    eval_iters=20,
    eval_interval=250,
    batch_size=16,
    block_size=64,
    n_embd=64,
    dropout=0.0,  # such a small network does not overfit in so few steps
    learning_rate=1e-3,
    max_iters=1000,
)
