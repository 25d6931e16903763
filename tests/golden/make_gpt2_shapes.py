"""Make gpt2_shapes.npz: the logits of Hugging Face GPT-2s of several shapes.

For maintainers, in an environment with torch and transformers (the tests need neither):

    python tests/golden/make_gpt2_shapes.py

Of each case, by its name: <case>/config, the text of the config.json that transformers writes;
<case>/tensor/<name>, its state dict in float16 (without the tied lm_head); <case>/tokens [B, T];
<case>/logits [B, T, V] in float32, computed in float64.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

PATH = Path(__file__).with_name("gpt2_shapes.npz")
# vocab_size, n_positions, n_embd, n_layer, n_head, n_inner, activation_function
CASES = {
    "small": (11, 6, 8, 1, 1, None, "gelu_new"),
    "padded vocabulary": (130, 9, 20, 2, 5, None, "gelu_new"),  # past one row of 128
    "exact gelu": (128, 12, 16, 3, 2, 24, "gelu"),
    "tanh by its other name": (40, 5, 24, 2, 3, 40, "gelu_pytorch_tanh"),
    "relu": (17, 7, 12, 1, 4, 10, "relu"),
}
KEYS = "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"


def main() -> None:
    data: dict[str, np.ndarray | str] = {}
    rng = np.random.default_rng(1337)
    for case, values in CASES.items():
        special = {"bos_token_id": None, "eos_token_id": None}
        config = GPT2Config(**dict(zip(KEYS, values, strict=True)), **special)
        model = GPT2LMHeadModel(config).double().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
                value = rng.normal(mean, 0.3, p.shape).astype(np.float16)
                p.copy_(torch.from_numpy(value.astype(np.float64)))
                data[f"{case}/tensor/{name}"] = value
            tokens = rng.integers(0, config.vocab_size, (2, config.n_positions))
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        data[f"{case}/config"] = config.to_json_string()
        data[f"{case}/tokens"] = tokens
        data[f"{case}/logits"] = logits.astype(np.float32)
        print(f"{case}: |logits| {np.abs(logits).mean():.2f}")
    np.savez_compressed(PATH, **data)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
