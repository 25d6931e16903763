"""Evaluate OpenAI's gpt2-large (774M parameters), as nanoGPT's config of this name does."""

from configs.eval_gpt2 import config as eval_gpt2

config = eval_gpt2.replace(out_dir="out/eval_gpt2-large", init_from="gpt2-large")
