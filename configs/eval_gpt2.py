"""Evaluate OpenAI's gpt2 (124M parameters), as nanoGPT's config of this name does."""

from jaxgpt.config import Config

config = Config(
    out_dir="out/eval_gpt2",
    init_from="gpt2",
    eval_only=True,
    eval_iters=500,  # many, for an accurate estimate
    batch_size=8,
)
