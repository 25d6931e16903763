"""The losses of OpenAI's gpt2-medium (350M parameters); nanoGPT's config of this name."""

from jaxgpt.config import Config

config = Config(
    out_dir="out/eval_gpt2-medium",
    init_from="gpt2-medium",
    eval_only=True,
    eval_iters=500,  # many, for a good estimate
    batch_size=8,
)
