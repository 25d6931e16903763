"""Define the lecture's stages. Each one is the stage before it with a few keys changed."""

from examples.lecture.config import LectureConfig

BIGRAM = LectureConfig(
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
    lm_head_bias=True,
    init="torch",  # from here on, PyTorch's defaults and the lecture's values
    learning_rate=1e-3,
    decay_lr=False,
    max_iters=5000,
    weight_decay=0.01,
    decay_bias_and_norm=True,
    beta2=0.999,
    grad_clip=0.0,
    steps_per_call=100,  # because each step is short
)

POSITIONS = BIGRAM.replace(
    out_dir="out/lecture/2_positions",
    position="learned",
)

ONE_HEAD = POSITIONS.replace(
    out_dir="out/lecture/3_one_head",
    n_layer=1,
    mlp="none",
    residual=False,
    attention_output_proj=False,
    qkv_bias=False,
    attention_scale="embedding",  # a mistake of the lecture; with one head, the width is right
)

FOUR_HEADS = ONE_HEAD.replace(
    out_dir="out/lecture/4_heads",
    n_head=4,
)

FEED_FORWARD = FOUR_HEADS.replace(
    out_dir="out/lecture/5_feed_forward",
    mlp="relu",
    mlp_dim=32,  # in the lecture, it becomes four times n_embd in the next stage
)

RESIDUALS = FEED_FORWARD.replace(
    out_dir="out/lecture/6_residuals",
    n_layer=3,
    residual=True,
    attention_output_proj=True,
    mlp_dim=0,  # four times n_embd
)

LAYER_NORM = RESIDUALS.replace(
    out_dir="out/lecture/7_layer_norm",
    norm="layernorm",
)

LAYER_NORM_POST = LAYER_NORM.replace(
    out_dir="out/lecture/7_layer_norm_post",
    norm_position="post",
)

DROPOUT_AND_SCALE = LAYER_NORM.replace(
    out_dir="out/lecture/8_dropout_and_scale",
    batch_size=64,
    block_size=256,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    embed_dropout=False,
    learning_rate=3e-4,
    steps_per_call=0,
)

DROPOUT_AND_SCALE_ON_CPU = DROPOUT_AND_SCALE.replace(
    eval_iters=20,
    batch_size=16,
    block_size=64,
    n_layer=4,
    n_head=4,
    n_embd=128,
    dropout=0.1,
    learning_rate=1e-3,
    max_iters=2000,
)
