"""GPT-2's weights: their names here and there; from folders, the hub, nanoGPT's ckpt.pt.

V vocabulary, T positions, D embedding, N heads, H head width, F MLP hidden; 3 is query, key, value.
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
from jax.sharding import Mesh

from jaxgpt import model
from jaxgpt.config import Config, ModelConfig, UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokens import GPT2_VOCAB
from jaxgpt.kernels.norm import NORM_EPSILON
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.train_step import abstract_params

# Our parameter -> GPT-2's name for it, and its letters: those that stand together are one axis
# there and several here. So the columns of `c_attn` are query, key, value; of each, head by head.
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
PREFIXES = "_orig_mod.", "transformer."  # of torch.compile, and of a GPT-2 with its output map
NOT_WEIGHTS = ".attn.bias", ".attn.masked_bias"  # masks that some files hold
TIED = "lm_head.weight"  # the embedding once more

# What of config.json says something else here, or may say nothing else.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu_tanh",
}
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# What GPT-2's format can say of a model of ours; biases of zero can stand for none.
EXPRESSIBLE = {
    "norm": "layernorm",
    "norm_position": "pre",
    "position": "learned",
    "tie_embeddings": True,
    "qk_norm": False,
    "logit_softcap": 0.0,
    "sliding_window": 0,
    "causal": True,
    "value_residual": False,
    "residual": True,
    "out_projection": True,
    "score_scale": "head",
    "head_bias": False,
}
HUB = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
CONFIG, WEIGHTS, CKPT = "config.json", "model.safetensors", "ckpt.pt"
OUR_TOKENIZER = "jaxgpt_tokenizer.json"  # one that transformers could not read


class Tensor(NamedTuple):
    """An array that is read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Weights:
    """A GPT-2 as it was found: its model's keys, and its tensors by GPT-2's names."""

    source: str
    keys: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    def load(self, config: Config, mesh: Mesh) -> dict[str, Any]:
        """The parameters of `config`'s model, float32, on the mesh.

        `config` has the model's keys, but its `block_size` may be smaller: later positions are
        cut off. Rows that pad the vocabulary are zero.
        """
        sizes, params = _sizes(config), {}
        for path, (name, letters) in rows(config).items():
            array = self.tensors[name].read().astype(np.float32)
            if letters == "V D":
                array = np.pad(array, ((0, config.padded_vocab_size - len(array)), (0, 0)))
            elif letters == "T D":
                array = array[: config.block_size]
            else:
                array = array.reshape([sizes[letter] for letter in letters.replace(" ", "")])
            *parents, leaf = (int(part) if part.isdigit() else part for part in path.split("."))
            node: dict = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array
        params = model.stack(params) if config.scan_layers else params
        return jax.tree.map(
            lambda a, p: jax.make_array_from_callback(a.shape, a.sharding, p.__getitem__),
            abstract_params(config, mesh),
            params,
        )

    def tokenizer(self, data_dir: str) -> Tokenizer:
        """The tokenizer beside the weights, or GPT-2's where their vocabulary has its size."""
        vocab_size = self.keys["vocab_size"]
        files = [self.folder / name for name in (OUR_TOKENIZER, tokenizers.FILE)]
        if file := next((file for file in files if file.is_file()), None):
            tokenizer = tokenizers.load(file)
        elif GPT2_VOCAB <= vocab_size <= GPT2_VOCAB + 127:  # or padded
            tokenizer = tokenizers.gpt2(data_dir)
        else:
            raise UserError(f"{self.source}: there is no {tokenizers.FILE} beside the weights")
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{self.source}: its tokenizer has {tokenizer.vocab_size} ids, but the weights "
                f"have vocab_size={vocab_size}"
            )
        return tokenizer


def rows(c: ModelConfig) -> dict[str, tuple[str, str]]:
    """PARAM_MAP for the layers that the model has, without the biases that it has not."""
    rows = {}
    for path, (name, letters) in PARAM_MAP.items():
        for layer in range(c.n_layer) if "*" in path else [0]:
            rows[path.replace("*", str(layer))] = name.replace("*", str(layer)), letters
    return {path: row for path, row in rows.items() if c.bias or not path.endswith(".bias")}


def _sizes(c: ModelConfig) -> dict[str, int]:
    sizes = {"V": c.vocab_size, "T": c.block_size, "D": c.n_embd, "3": 3}
    return sizes | {"N": c.n_head, "H": c.head_dim, "F": c.mlp_hidden_dim}


# ---- in --------------------------------------------------------------------------------------


def resolve_init(
    config: Config, checkpoints: Checkpoints, given: frozenset[str]
) -> tuple[Weights | run_dir.RunWeights | None, Config, list[str]]:
    """What a run begins with: its weights if `init_from` names any, its config, lines about it.

    The model's keys follow the weights, or the run that goes on, wherever the user did not ask
    for another model. Positions past a smaller `block_size` are cut off. Raises `UserError`.
    """
    if config.init_from in ("scratch", "resume", "auto"):
        theirs = run_dir.saved_model(config, checkpoints)
        adopted = run_dir.merge_model_keys(config, theirs, f"the run in {config.out_dir}", given)
        changed = [f"{k}={v}" for k, v in theirs.items() if v != getattr(config, k)]
        return None, adopted, [f"the run's model: {', '.join(changed)}"] if changed else []
    if run_dir.is_run(Path(config.init_from)):
        weights = run_dir.open_weights(config)
    else:
        weights = open_weights(config.init_from)
    positions = weights.keys["block_size"]
    theirs = weights.keys | {"block_size": min(positions, config.block_size)}
    fixed = EXPRESSIBLE | {"qkv_bias": True}
    config = run_dir.merge_model_keys(config, fixed | theirs, config.init_from, given)
    model_keys = ", ".join(f"{key}={value}" for key, value in theirs.items())
    lines = [f"weights of {config.init_from}: {model_keys}"]
    if config.block_size < positions:
        lines.append(f"positions: the first {config.block_size} of {positions}")
    return weights, config, lines


def open_weights(init_from: str) -> Weights:
    """The GPT-2 that `init_from` names; names and shapes are checked, no array is read yet.

    It is a folder with config.json and model.safetensors, a nanoGPT ckpt.pt or a folder with
    one, or a model of the Hugging Face hub, which is downloaded. Raises `UserError`.
    """
    path = Path(init_from)
    if path.is_file() or (path / CKPT).is_file():
        weights = _open_nanogpt(init_from, path if path.is_file() else path / CKPT)
    elif path.is_dir():
        weights = _open_folder(init_from, path)
    elif init_from in HUB or (init_from.count("/") == 1 and not init_from.startswith((".", "/"))):
        weights = _open_folder(init_from, _download(init_from))
    else:
        raise UserError(
            f"init_from={init_from!r}: must be resume (to train, also scratch or auto), "
            f"{', '.join(HUB)}, an owner/name of the hub, or a folder or ckpt.pt that is there"
        )
    config = Config(**weights.keys)
    expected = dict(rows(config).values())
    for name, letters in expected.items():
        if name not in weights.tensors:
            raise UserError(f"{init_from}: there is no tensor {name}")
        shape = shape_there(config, letters)
        if weights.tensors[name].shape != shape:
            there = weights.tensors[name].shape
            raise UserError(f"{init_from}: tensor {name} has shape {there}, expected {shape}")
    if unknown := sorted(weights.tensors.keys() - expected.keys()):
        raise UserError(f"{init_from}: tensor {unknown[0]} is not of a GPT-2 with these sizes")
    return weights


def shape_there(c: ModelConfig, letters: str) -> tuple[int, ...]:
    sizes = _sizes(c)
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in letters.split())


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise needs_extra(f"init_from={name!r}") from error
    wanted = [CONFIG, "model*.safetensors", tokenizers.FILE]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # offline, no such name, disk full: the hub raises many kinds
        raise UserError(
            f"init_from={name!r}: no such folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__})"
        ) from error


def _open_folder(source: str, folder: Path) -> Weights:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise needs_extra(f"init_from={source!r}") from error
    keys, tensors = _model_keys(folder / CONFIG), {}

    def read(file: Path, name: str) -> np.ndarray:
        with safe_open(file, "numpy") as tensors:
            return tensors.get_tensor(name)

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: there is no {WEIGHTS}")
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    shape = tuple(opened.get_slice(name).get_shape())
                    tensors[name] = Tensor(shape, partial(read, file, name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error
    return Weights(source, keys, _plain_names(tensors), folder)


def _model_keys(file: Path) -> dict[str, Any]:
    """The model's keys that a config.json of transformers stands for."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not the config of a GPT-2 ({error})") from error
    if "max_iters" in fields:
        raise UserError(f"{file}: is of a jaxgpt run; name it with --out_dir={file.parent}")
    for key, value in FIXED.items():
        if fields.get(key, value) != value:
            raise UserError(f"{file}: {key}={fields[key]!r}: must be {value!r}")
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise UserError(f"{file}: activation_function={activation!r}: must be one of {allowed}")
    sizes = {
        "n_layer": fields.get("n_layer", 12),
        "n_head": fields.get("n_head", 12),
        "n_embd": fields.get("n_embd", 768),
        "vocab_size": fields.get("vocab_size", GPT2_VOCAB),
        "block_size": fields.get("n_positions", 1024),
    }
    inner = fields.get("mlp_dim") or 0
    keys = sizes | {"mlp_dim": inner if inner != 4 * sizes["n_embd"] else 0}
    return _checked(keys | {"bias": True, "mlp": ACTIVATIONS[activation]}, file)


def _checked(keys: dict[str, Any], file: Path) -> dict[str, Any]:
    try:
        Config(**keys)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return keys


def _open_nanogpt(source: str, file: Path) -> Weights:
    """A checkpoint of nanoGPT's train.py, whose linear maps are [out, in]."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"init_from={source!r}: reading {file} needs PyTorch: torch") from error
    try:
        # of what a pickle can do, tensors and plain containers alone
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        args = checkpoint["model_args"]
        names = "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias"
        keys = {name: args[name] for name in names} | {"mlp": "gelu", "mlp_dim": 0}
        found = _plain_names(checkpoint["model"])
    except Exception as error:  # torch raises many kinds, and advises to let a pickle run
        raise UserError(f"{file}: not a checkpoint of nanoGPT ({type(error).__name__})") from error

    def turned(name: str, tensor: Any) -> Tensor:
        is_linear = name.startswith("h.") and tensor.ndim == 2
        tensor = tensor.t() if is_linear else tensor
        return Tensor(tuple(tensor.shape), lambda: tensor.float().numpy())

    tensors = {name: turned(name, tensor) for name, tensor in found.items()}
    return Weights(source, _checked(keys, file), tensors, file.parent)


def _plain_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors that are weights, without the prefixes that some files have."""
    plain = {}
    for name, tensor in tensors.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name != TIED and not name.endswith(NOT_WEIGHTS):
            plain[name] = tensor
    return plain


def needs_extra(what: str) -> UserError:
    return UserError(f"{what}: needs the extra `hf`: pip install 'jaxgpt[hf]'")


class Trained(NamedTuple):
    """A model to sample or to evaluate: a run's, or weights."""

    config: Config
    load: Callable[[Mesh], tuple[dict[str, Any], int | None]]
    """-> the parameters on a mesh, and the step that they are from."""
    tokenizer: Callable[[], Tokenizer]


def load_trained(
    init_from: str, out_dir: str, checkpoint: str, data_dir: str = "", config_file: str = ""
) -> Trained:
    """The model of a run for `init_from` resume, else weights. Raises `UserError`."""
    if init_from == "resume":
        config = run_dir.load_config(out_dir, config_file)
        config = config.replace(data_dir=data_dir or config.data_dir)
        load = partial(run_dir.load_params, config, checkpoint)
        return Trained(config, load, partial(tokenizers.load, Path(out_dir, tokenizers.FILE)))
    weights = open_weights(init_from)
    config = Config(**weights.keys, data_dir=data_dir or "data")
    load_weights = lambda mesh: (weights.load(config, mesh), None)
    return Trained(config, load_weights, partial(weights.tokenizer, config.data_dir))
