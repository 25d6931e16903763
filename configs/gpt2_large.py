"""Train a GPT of GPT-2 Large's size, 774M parameters, on OpenWebText.

Data, schedule and tokens per step are those of gpt2.py. The peak learning rate is lower: it is that
of GPT-3 at this size (Brown et al. 2020, table 2.1).
"""

from configs.gpt2 import config as gpt2

config = gpt2.replace(
    out_dir="out/gpt2_large",
    n_layer=36,
    n_head=20,
    n_embd=1280,
    batch_size=8,
    gradient_accumulation_steps=60,  # 480 sequences, as in gpt2.py
    learning_rate=2.5e-4,
    min_lr=2.5e-5,
    wandb_run_name="gpt2-774M",
)
