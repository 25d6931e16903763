"""Train the baby GPT of shakespeare.py under nanoGPT's name for it, without a CPU variant."""

from configs.shakespeare import config as baby_gpt

config = baby_gpt.replace(out_dir="out-shakespeare-char")
