"""Train a GPT of GPT-2 Medium's size, 350M parameters, on OpenWebText.

Data, schedule and tokens per step are those of gpt2.py. The peak learning rate is lower: it is that
of GPT-3 at this size (Brown et al. 2020, table 2.1).
"""

from configs.gpt2 import config as gpt2

config = gpt2.replace(
    out_dir="out/gpt2_medium",
    n_layer=24,
    n_head=16,
    n_embd=1024,
    batch_size=8,
    gradient_accumulation_steps=60,  # 480 sequences, as in gpt2.py
    learning_rate=3e-4,
    min_lr=3e-5,
    wandb_run_name="gpt2-350M",
)
