"""Train the speedrun's 124M model on FineWeb to a validation loss of 3.28.

Run `jaxgpt prepare fineweb10B --shards=25` first: 2.5 billion tokens, of which the windows that
start at documents hold about half. A step trains on 524,288 tokens, on any number of devices.
docs/speedrun.md gives the planned time; no such run has been measured.
"""

from examples.speedrun.model import SpeedrunConfig

config = SpeedrunConfig(
    out_dir="out/speedrun_gpt2",
    dataset="fineweb10B",
    align_documents=True,
    target_val_loss=3.28,
    eval_interval=125,
    eval_iters=160,  # 5.2 million tokens per split, because the run stops by this loss
    log_interval=10,
    batch_size=32,  # largest number of sequences that a device processes at a time
    batch_tokens=524_288,
    block_size=1024,
    n_layer=12,
    n_head=6,  # 128 wide, which attention computes faster than 64
    n_embd=768,
    zero_init_projections=True,
    logit_softcap=15.0,
    value_embeddings=3,
    embedding_shortcut=True,
    unet_skips=True,
    first_window=256,
    optimizer="normuon",
    muon_polynomial="polar_express",
    momentum_warmup_iters=300,
    cautious_weight_decay=True,
    learning_rate=3e-3,
    min_lr=3e-4,
    lr_schedule="wsd",
    decay_fraction=0.5,
    warmup_iters=50,
    beta1=0.8,
    max_iters=2_500,  # trains on 1.3 billion tokens
)
