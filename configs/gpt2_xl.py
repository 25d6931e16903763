"""A GPT of GPT-2 XL's size, 1.5 billion parameters, on OpenWebText.

For GPUs of 80 GB. A TPU wants --scan_layers=True, or it compiles for minutes, and --remat=dots.

Data, schedule and tokens a step are those of gpt2.py; the peak learning rate is lower, as GPT-3's
table has it for a model of this width (Brown et al. 2020, table 2.1).
"""

from pathlib import Path

from jaxgpt.cli.command_line import load

config = load(str(Path(__file__).with_name("gpt2.py")))["config"]
config = config.replace(
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
