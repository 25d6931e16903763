"""Train a GPT of GPT-2 XL's size, 1.5 billion parameters, on OpenWebText.

The config is for GPUs with 80 GB. On TPUs, add --scan_layers=True and --remat=dots; without
--scan_layers=True the compilation takes minutes.

Data, schedule and tokens per step are those of gpt2.py. The peak learning rate is lower: it is that
of GPT-3 1.3B, the nearest size (Brown et al. 2020, table 2.1).
"""

from configs.gpt2 import config as gpt2

config = gpt2.replace(
    out_dir="out/gpt2_xl",
    n_layer=48,
    n_head=25,
    n_embd=1600,
    batch_size=8,
    gradient_accumulation_steps=60,  # 480 sequences, as in gpt2.py
    learning_rate=2e-4,
    min_lr=2e-5,
    wandb_run_name="gpt2-1.5B",
)
