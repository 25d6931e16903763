"""Evaluate OpenAI's gpt2-xl (1558M parameters), as nanoGPT's config of this name does."""

from configs.eval_gpt2 import config as eval_gpt2

config = eval_gpt2.replace(out_dir="out/eval_gpt2-xl", init_from="gpt2-xl")
