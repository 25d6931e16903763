"""nanoGPT's config of this name: the baby GPT of shakespeare.py, without a CPU variant."""

from configs.shakespeare import config as baby_gpt

config = baby_gpt.replace(out_dir="out-shakespeare-char")
