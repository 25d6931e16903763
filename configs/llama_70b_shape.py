"""Give `jaxgpt plan` the shape of Llama 2 70B (Touvron et al. 2023).

As in llama_7b_shape.py, a sequence has half of Llama 2's context.
"""

from configs.llama_7b_shape import config as llama_7b

config = llama_7b.replace(
    out_dir="out/llama_70b",
    n_layer=80,
    n_head=64,
    n_kv_head=8,  # grouped-query attention
    n_embd=8192,
    mlp_dim=28_672,
    learning_rate=1.5e-4,
    min_lr=1.5e-5,
)
