"""The losses of OpenAI's gpt2-large (774M parameters); nanoGPT's config of this name."""

from jaxgpt.config import Config

config = Config(
    out_dir="out/eval_gpt2-large",
    init_from="gpt2-large",
    eval_only=True,
    eval_iters=500,  # many, for a good estimate
    batch_size=8,
)
