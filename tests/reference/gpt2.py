"""Read the golden GPT-2 (see tests/golden/make_gpt2_golden.py) with our names and shapes."""

from pathlib import Path

import numpy as np

# Path of a parameter -> (HF name, shape in letters; T is the block size).
TOP = {
    "embed.kernel": ("wte.weight", "V D"),
    "pos_embed.kernel": ("wpe.weight", "T D"),
    "ln_f.scale": ("ln_f.weight", "D"),
    "ln_f.bias": ("ln_f.bias", "D"),
}
BLOCK = {
    "ln_1.scale": ("ln_1.weight", "D"),
    "ln_1.bias": ("ln_1.bias", "D"),
    "attn.qkv.kernel": ("attn.c_attn.weight", "D 3 N H"),
    "attn.qkv.bias": ("attn.c_attn.bias", "3 N H"),
    "attn.out.kernel": ("attn.c_proj.weight", "N H D"),
    "attn.out.bias": ("attn.c_proj.bias", "D"),
    "ln_2.scale": ("ln_2.weight", "D"),
    "ln_2.bias": ("ln_2.bias", "D"),
    "mlp.up.kernel": ("mlp.c_fc.weight", "D F"),
    "mlp.up.bias": ("mlp.c_fc.bias", "F"),
    "mlp.down.kernel": ("mlp.c_proj.weight", "F D"),
    "mlp.down.bias": ("mlp.c_proj.bias", "D"),
}


class Golden:
    """The golden file: `arrays` as stored, `sizes` and `hyper` by the names of config keys."""

    def __init__(self, file: Path):
        with np.load(file) as archive:
            self.arrays = dict(archive)
        hf = {"block_size": "n_positions", "mlp_dim": "n_inner"}
        names = ("vocab_size", "block_size", "n_embd", "n_layer", "n_head", "mlp_dim")
        self.sizes = {name: self.arrays[f"config/{hf.get(name, name)}"].item() for name in names}
        hyper = {k.removeprefix("hyper/"): v for k, v in self.arrays.items() if "hyper/" in k}
        self.hyper = {k: v.item() for k, v in hyper.items() if k != "eps"}  # 1e-8, as everywhere

    def params(self, kind: str) -> dict:
        """Return the tree of `kind` (param, grad or final), with zero rows of padding."""
        D, N, F = (self.sizes[key] for key in ("n_embd", "n_head", "mlp_dim"))
        sizes = {
            "3": 3,
            "V": 128,
            "T": self.sizes["block_size"],
            "D": D,
            "N": N,
            "H": D // N,
            "F": F,
        }
        table = dict(TOP)
        for i in range(self.sizes["n_layer"]):
            table |= {f"blocks.{i}.{k}": (f"h.{i}.{hf}", s) for k, (hf, s) in BLOCK.items()}
        tree: dict = {}
        for path, (name, shape) in table.items():
            value = self.arrays[f"{kind}/transformer.{name}"]
            if path == "embed.kernel":
                value = np.pad(value, ((0, sizes["V"] - len(value)), (0, 0)))
            *parents, leaf = (int(part) if part.isdigit() else part for part in path.split("."))
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value.reshape([sizes[letter] for letter in shape.split()])
        assert len(table) == sum(key.startswith(f"{kind}/") for key in self.arrays)
        return tree
