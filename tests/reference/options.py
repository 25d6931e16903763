"""Define option sets that together use every model option at least once."""

DEFAULTS = {
    "vocab_size": 11,
    "block_size": 7,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 0,
    "n_embd": 16,
    "mlp_dim": 20,
    "norm": "layernorm",
    "norm_gain": True,
    "norm_position": "pre",
    "position": "learned",
    "mlp": "gelu",
    "bias": True,
    "tie_embeddings": True,
    "qk_norm": False,
    "logit_softcap": 0.0,
    "sliding_window": 0,
    "causal": True,
    "value_residual": False,
}
MODERN = {"norm": "rmsnorm", "position": "rope", "mlp": "relu2", "bias": False, "qk_norm": True}
MODEL_CASES = [
    {},
    {"bias": False, "tie_embeddings": False},
    {"norm": "rmsnorm", "mlp": "gelu_tanh"},
    {"norm_position": "post", "position": "sinusoidal", "mlp": "relu"},
    {"norm_position": "post", "norm": "rmsnorm", "tie_embeddings": False},
    {"position": "none", "mlp": "relu2", "n_kv_head": 4},
    {"position": "rope", "n_kv_head": 2},
    {"position": "rope", "qk_norm": True, "mlp": "swiglu"},
    {"n_kv_head": 1, "qk_norm": True, "sliding_window": 3},
    {"causal": False, "mlp": "swiglu", "bias": False},
    {"logit_softcap": 1.5},
    {"norm_gain": False},
    {"norm_gain": False, "norm": "rmsnorm", "norm_position": "post", "n_kv_head": 2},
    {"value_residual": True, "n_layer": 3},
    {"value_residual": True, "n_layer": 1, "norm_position": "post"},
    MODERN | {"n_kv_head": 2, "value_residual": True, "sliding_window": 4, "logit_softcap": 2.0},
    {"n_layer": 0},
    {"n_layer": 0, "tie_embeddings": False, "norm": "rmsnorm", "position": "none"},
]
# Options that only the lecture's models have; numpy_gpt.py knows their defaults.
LECTURE = {
    "attention_output_proj": False,
    "qkv_bias": False,
    "tie_embeddings": False,
    "lm_head_bias": True,
}
LECTURE_CASES = [
    LECTURE | {"mlp": "relu", "attention_scale": "embedding"},
    LECTURE | {"norm": "none", "mlp": "none", "residual": False},
    {"residual": False, "norm_position": "post", "mlp": "gelu_tanh", "qkv_bias": False},
    {"norm": "none", "norm_position": "post", "lm_head_bias": True, "n_layer": 1},
]
