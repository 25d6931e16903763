"""Give `jaxgpt plan` the shape of Llama 2 7B (Touvron et al. 2023).

This config cannot be trained as it is, because jaxgpt has no dataset with its vocabulary. A
sequence has 2048 tokens, half of Llama 2's context.
"""

from jaxgpt.config import Config

config = Config(
    out_dir="out/llama_7b",
    dataset="openwebtext",
    batch_size=1,
    gradient_accumulation_steps=512,  # 1M tokens per step
    vocab_size=32_000,
    block_size=2048,
    n_layer=32,
    n_head=32,
    n_embd=4096,
    mlp_dim=11_008,
    bias=False,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    tie_embeddings=False,
    learning_rate=3e-4,
    min_lr=3e-5,
    scan_layers=True,
    remat="full",
)
