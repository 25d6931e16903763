"""Read GPT-2's weights from a folder, the Hugging Face hub, or nanoGPT's ckpt.pt.

V vocabulary, T positions, D embedding, N heads, H head dim, F MLP hidden; 3 is query, key, value.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from jaxgpt.config import Config, ModelConfig, UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokens import GPT2_VOCAB, PADDED_GPT2
from jaxgpt.kernels.norm import NORM_EPSILON
from jaxgpt.runtime.bucket import local_data_dir
from jaxgpt.runtime.files import import_extra, reason
from jaxgpt.train_step import abstract_params

# Our parameter -> its name in GPT-2's files, and its axes there. Several letters in one axis are
# several axes of our parameter: the columns of `c_attn` are query, key and value, head by head.
PARAM_MAP = {
    "embed.kernel": ("wte.weight", "V D"),
    "pos_embed.kernel": ("wpe.weight", "T D"),
    "blocks.*.ln_1.scale": ("h.*.ln_1.weight", "D"),
    "blocks.*.ln_1.bias": ("h.*.ln_1.bias", "D"),
    "blocks.*.attn.qkv.kernel": ("h.*.attn.c_attn.weight", "D 3NH"),
    "blocks.*.attn.qkv.bias": ("h.*.attn.c_attn.bias", "3NH"),
    "blocks.*.attn.out.kernel": ("h.*.attn.c_proj.weight", "NH D"),
    "blocks.*.attn.out.bias": ("h.*.attn.c_proj.bias", "D"),
    "blocks.*.ln_2.scale": ("h.*.ln_2.weight", "D"),
    "blocks.*.ln_2.bias": ("h.*.ln_2.bias", "D"),
    "blocks.*.mlp.up.kernel": ("h.*.mlp.c_fc.weight", "D F"),
    "blocks.*.mlp.up.bias": ("h.*.mlp.c_fc.bias", "F"),
    "blocks.*.mlp.down.kernel": ("h.*.mlp.c_proj.weight", "F D"),
    "blocks.*.mlp.down.bias": ("h.*.mlp.c_proj.bias", "D"),
    "ln_f.scale": ("ln_f.weight", "D"),
    "ln_f.bias": ("ln_f.bias", "D"),
}
PREFIXES = "_orig_mod.", "transformer."  # of torch.compile, and of a GPT-2 with an output layer
NOT_WEIGHTS = ".attn.bias", ".attn.masked_bias"  # masks that some files hold
TIED = "lm_head.weight"  # a copy of the embedding

ACTIVATIONS = {  # GPT-2's name -> ours; export writes the first name that fits
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SIZES = {  # a field of config.json -> our key, and the field's default
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "vocab_size": ("vocab_size", GPT2_VOCAB),
    "n_positions": ("block_size", 1024),
}
# Values that the fields of config.json must have if they exist.
REQUIRED_FIELDS = {
    "model_type": "gpt2",
    "layer_norm_epsilon": NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Values that our keys must have for GPT-2's format; missing biases are written as zeros.
REQUIRED_KEYS: dict[str, Any] = {"norm": "layernorm", "norm_position": "pre", "position": "learned"}
REQUIRED_KEYS |= {"tie_embeddings": True, "qk_norm": False, "logit_softcap": 0.0}
REQUIRED_KEYS |= {"sliding_window": 0, "causal": True, "value_residual": False}
REQUIRED_KEYS |= {"norm_gain": True}
HUB = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
CONFIG, WEIGHTS, CKPT = "config.json", "model.safetensors", "ckpt.pt"
OUR_TOKENIZER = "jaxgpt_tokenizer.json"  # a tokenizer that transformers cannot read
GPT2_EXPECTED = "expected the tensors of a GPT-2 with the sizes of its config"


class Tensor(NamedTuple):
    """An array in a file, read on demand."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Weights:
    """The weights of a GPT-2: its model's keys, and its tensors by GPT-2's names."""

    source: str
    keys: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    def load(self, config: Config, mesh: Mesh) -> dict[str, Any]:
        """Read the parameters of `config`'s model onto the mesh, in the dtype that the run keeps.

        Positions past `config.block_size` are cut off. Rows that pad the vocabulary are zero.
        """
        sizes, arrays = _sizes(config), {}
        for path, (name, letters) in param_rows(config).items():
            array = self.tensors[name].read().astype(np.float32)
            if letters == "V D":
                array = np.pad(array, ((0, config.padded_vocab_size - len(array)), (0, 0)))
            elif letters == "T D":
                array = array[: config.block_size]
            else:
                array = array.reshape([sizes[letter] for letter in letters.replace(" ", "")])
            keys = (int(part) if part.isdigit() else part for part in path.split("."))
            arrays[tuple(keys)] = array
        params = unflatten_dict(arrays)
        if config.scan_layers:
            params = stack_layers(params)

        def put(like: jax.ShapeDtypeStruct, array: np.ndarray) -> jax.Array:
            array = array.astype(like.dtype, copy=False)
            return jax.make_array_from_callback(like.shape, like.sharding, array.__getitem__)

        return jax.tree.map(put, abstract_params(config, mesh), params)

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer beside the weights: the file of an export, or a tokenizer.json."""
        ours = self.folder / OUR_TOKENIZER
        return ours if ours.is_file() else self.folder / tokenizers.FILE

    def tokenizer(self, data_dir: str) -> Tokenizer:
        """Load the tokenizer beside the weights, or GPT-2's if the vocabulary has GPT-2's size.

        Raises `UserError` if there is no tokenizer or if it has more ids than the weights.
        """
        vocab_size, file = self.keys["vocab_size"], self.tokenizer_file
        if file.is_file():
            tokenizer = tokenizers.load(file)
        elif vocab_size in PADDED_GPT2:
            tokenizer = tokenizers.gpt2(local_data_dir(data_dir, "gpt2"))
        else:
            raise UserError(f"{self.source}: no tokenizer; expected {file}")
        if tokenizer.vocab_size > vocab_size:
            problem = f"its tokenizer has {tokenizer.vocab_size} ids"
            advice = f"expected at most the {vocab_size} of the weights; try another {file}"
            raise UserError(f"{self.source}: {problem}; {advice}")
        return tokenizer


def stack_layers(params: dict) -> dict:
    """Convert NumPy parameters of a model without `scan_layers` to those of a model with it."""
    blocks = [params["blocks"][i] for i in range(len(params["blocks"]))]
    return params | {"blocks": jax.tree.map(lambda *layers: np.stack(layers), *blocks)}


def param_rows(c: ModelConfig) -> dict[str, tuple[str, str]]:
    """Expand PARAM_MAP for every layer, without biases if the model has none."""
    rows = {}
    for path, (name, letters) in PARAM_MAP.items():
        for layer in range(c.n_layer) if "*" in path else [0]:
            if c.bias or not path.endswith(".bias"):
                rows[path.replace("*", str(layer))] = name.replace("*", str(layer)), letters
    return rows


def hf_shape(c: ModelConfig, letters: str) -> tuple[int, ...]:
    """Return the shape that a parameter with these letters has in GPT-2's files."""
    sizes = _sizes(c)
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in letters.split())


def _sizes(c: ModelConfig) -> dict[str, int]:
    sizes = {"V": c.vocab_size, "T": c.block_size, "D": c.n_embd, "3": 3}
    return sizes | {"N": c.n_head, "H": c.head_dim, "F": c.mlp_hidden_dim}


def open_weights(init_from: str) -> Weights:
    """Open a GPT-2: check the names and shapes of its weights, but read no array yet.

    `init_from` is a folder with config.json and model.safetensors, or a nanoGPT ckpt.pt or a folder
    with one. Otherwise it is a model of the Hugging Face hub, which is downloaded. Raises
    `UserError` for other sources, and for weights that are no GPT-2.
    """
    path = Path(init_from)
    if path.is_file() or (path / CKPT).is_file():
        file = path if path.is_file() else path / CKPT
        keys, tensors = _read_nanogpt(init_from, file)
    elif path.is_dir() or is_on_hub(init_from):
        file = (path if path.is_dir() else _download(init_from)) / CONFIG
        keys, tensors = _read_folder(init_from, file.parent)
    else:
        raise UserError(
            f"init_from={init_from!r}: no such weights; expected resume, {', '.join(HUB)}, an "
            "owner/name of the hub, a folder, a ckpt.pt, or in training scratch or auto"
        )
    try:
        config = Config(**keys)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    weights, expected = {}, dict(param_rows(config).values())
    for name, tensor in tensors.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name != TIED and not name.endswith(NOT_WEIGHTS):
            weights[name] = tensor
    for name, letters in expected.items():
        if name not in weights:
            raise UserError(f"{init_from}: no tensor {name}; {GPT2_EXPECTED}")
        found, shape = weights[name].shape, hf_shape(config, letters)
        if found != shape:
            raise UserError(f"{init_from}: tensor {name} has shape {found}; expected {shape}")
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise UserError(f"{init_from}: unknown tensor {unknown[0]}; {GPT2_EXPECTED}")
    return Weights(init_from, keys, weights, file.parent)


def is_on_hub(name: str) -> bool:
    """Tell whether a name may be a model's on the Hugging Face hub, and is no path in a folder."""
    is_owner_and_name = name.count("/") == 1 and name[0] not in "./"
    return name in HUB or (is_owner_and_name and not Path(name).parent.is_dir())


def _download(name: str) -> Path:
    subject = f"init_from={name!r}"
    hub = import_extra("huggingface_hub", subject, "hf")
    wanted = [CONFIG, "model*.safetensors", tokenizers.FILE, OUR_TOKENIZER]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # offline, no such name, disk full: the hub raises many types
        problem = f"no such folder, and the download failed ({type(error).__name__})"
        expected = "a folder of weights, or a name on the Hugging Face hub"
        raise UserError(f"{subject}: {problem}; expected {expected}") from error


def _read_folder(source: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    safetensors = import_extra("safetensors", f"init_from={source!r}", "hf")
    keys, tensors = _model_keys(folder / CONFIG), {}
    whole = folder / WEIGHTS
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights in it; expected {WEIGHTS}")
    for file in files:
        try:
            opened = safetensors.safe_open(file, "numpy")  # maps the file, reads its header
            for name in opened.keys():  # noqa: SIM118, it is no dict
                shape = tuple(opened.get_slice(name).get_shape())
                tensors[name] = Tensor(shape, partial(opened.get_tensor, name))
        except (safetensors.SafetensorError, OSError) as error:
            problem = f"not a safetensors file ({error})"
            raise UserError(f"{file}: {problem}; try to download it again") from error
    return keys, tensors


def _read_nanogpt(source: str, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read nanoGPT's ckpt.pt. Its linear maps are [out, in]; they become GPT-2's [in, out]."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        problem = f"reading {file} needs PyTorch"
        raise UserError(f"init_from={source!r}: {problem}; try pip install torch") from error
    try:
        # weights_only unpickles tensors and plain containers, and runs no code.
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        names = "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias"
        keys = {name: checkpoint["model_args"][name] for name in names}
        tensors = {}
        for name, tensor in checkpoint["model"].items():
            tensor = tensor.t() if ".h." in name and tensor.ndim == 2 else tensor
            tensors[name] = Tensor(tuple(tensor.shape), lambda t=tensor: t.float().numpy())
        return keys | {"mlp": "gelu", "mlp_dim": 0}, tensors
    except Exception as error:  # torch raises many types, and advises to let a pickle run
        problem = f"not a checkpoint of nanoGPT ({type(error).__name__})"
        raise UserError(f"{file}: {problem}; expected the ckpt.pt of its train.py") from error


def _model_keys(file: Path) -> dict[str, Any]:
    """Translate a config.json of transformers to the model's keys."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        problem = f"not the config of a GPT-2 ({reason(error)})"
        raise UserError(f"{file}: {problem}; expected a config.json of transformers") from error
    if "max_iters" in fields:
        raise UserError(f"{file}: belongs to a jaxgpt run; try --out_dir={file.parent}")
    activation = fields.get("activation_function", "gelu_new")
    for key, value in REQUIRED_FIELDS.items():
        if fields.get(key, value) != value:
            raise UserError(f"{file}: has {key}={fields[key]!r}; expected {value!r}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        raise UserError(f"{file}: has activation_function={activation!r}; expected {expected}")
    keys = {key: fields.get(field, default) for field, (key, default) in SIZES.items()}
    inner, width = fields.get("n_inner") or 0, keys["n_embd"]
    is_default = isinstance(width, int) and inner == 4 * width  # the config refuses other types
    keys["mlp_dim"] = 0 if is_default else inner
    return keys | {"bias": True, "mlp": ACTIVATIONS[activation]}
