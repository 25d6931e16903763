"""The losses of OpenAI's gpt2-xl (1558M parameters); nanoGPT's config of this name."""

from jaxgpt.config import Config

config = Config(
    out_dir="out/eval_gpt2-xl",
    init_from="gpt2-xl",
    eval_only=True,
    eval_iters=500,  # many, for a good estimate
    batch_size=8,
)
