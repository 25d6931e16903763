"""Export a run, or nanoGPT's weights, to a folder that transformers loads as a GPT-2.

V vocabulary, D embedding; huggingface.py has the table of names and letters.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers as bpe_library

from jaxgpt.config import Config, UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokenizer import END_OF_TEXT, BpeTokenizer, Tokenizer
from jaxgpt.data.tokens import PADDED_GPT2
from jaxgpt.interop import huggingface as hf
from jaxgpt.interop.trained import Trained, open_trained
from jaxgpt.model import unstack_layers
from jaxgpt.runtime.checkpoint import warn
from jaxgpt.runtime.files import atomic_write, folder_error, import_extra, reason
from jaxgpt.runtime.mesh import local_mesh


def export(
    out_dir: str, checkpoint: str, to: str, config_file: str = "", init_from: str = "resume"
) -> int | None:
    """Write a run to a folder that `transformers.GPT2LMHeadModel` loads; return its step.

    If `init_from` is not resume, it names weights to write, which have no step. Raises `UserError`
    for a model that GPT-2's format cannot describe, and for a folder in use.
    """
    safetensors = import_extra("safetensors.numpy", "export", "hf")
    SafetensorError = import_extra("safetensors", "export", "hf").SafetensorError
    trained = open_trained(init_from, out_dir, checkpoint, config=config_file)
    config, folder = trained.config, Path(to)
    _check_expressible(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"to={to!r}: exists already; expected a new or empty folder")
    tokenizer = _tokenizer_of(trained)
    params, step = trained.load(local_mesh())
    tensors = to_tensors(config, params)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fields = to_fields(config) | {"jaxgpt_step": step}
        fields |= _write_tokenizer(config, tokenizer, folder)
        safetensors.save_file(tensors, folder / hf.WEIGHTS, metadata={"format": "pt"})
        # The config is written last, because transformers loads nothing without it.
        atomic_write(folder / hf.CONFIG, json.dumps(fields, indent=2))
    except OSError as error:
        raise folder_error(f"to={to!r}", "--to", error) from error
    except SafetensorError as error:  # such as a full disk
        problem = f"cannot be written ({reason(error)})"
        raise UserError(
            f"to={to!r}: {problem}; expected a writable folder; try another --to"
        ) from error
    return step


def _check_expressible(c: Config) -> None:
    """Raise `UserError` if GPT-2's format cannot describe the model."""
    if type(c).make_model is not Config.make_model:
        raise UserError(f"{type(c).__name__}: not a GPT-2; expected a config without a make_model")
    required = dict(hf.REQUIRED_KEYS)
    if c.kv_heads != c.n_head:
        required["n_kv_head"] = c.n_head
    for key, value in required.items():
        if getattr(c, key) != value:
            raise UserError(f"{key}={getattr(c, key)!r}: not in GPT-2's format; expected {value!r}")
    if c.mlp not in hf.ACTIVATIONS.values():
        expected = ", ".join(sorted(set(hf.ACTIVATIONS.values())))
        raise UserError(f"mlp={c.mlp!r}: not in GPT-2's format; expected one of {expected}")


def to_tensors(config: Config, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Convert parameters to GPT-2's names and shapes, float32, without padded rows.

    Biases that the model lacks are zeros. Raises `UserError` for parameters that GPT-2 lacks.
    """
    params = jax.device_get(unstack_layers(params) if config.scan_layers else params)
    name_of = partial(jax.tree_util.keystr, simple=True, separator=".")
    ours = {name_of(path): array for path, array in jax.tree.leaves_with_path(params)}
    tensors = {}
    for path, (name, letters) in hf.param_rows(config.replace(bias=True)).items():
        shape = hf.hf_shape(config, letters)
        if path.endswith("bias"):
            ours.setdefault(path, np.zeros(shape))
        array = ours.pop(path)
        if letters == "V D":
            array = array[: config.vocab_size]
        tensors[f"transformer.{name}"] = np.ascontiguousarray(array.reshape(shape), np.float32)
    if ours:
        raise UserError(f"{', '.join(ours)}: not in GPT-2's format; expected a GPT-2")
    return tensors


def to_fields(c: Config) -> dict[str, Any]:
    """Make the fields of the config.json that transformers reads."""
    fields = hf.REQUIRED_FIELDS | {field: getattr(c, key) for field, (key, _) in hf.SIZES.items()}
    fields |= {"architectures": ["GPT2LMHeadModel"], "n_inner": c.mlp_dim or None}
    fields |= {"embd_pdrop": c.dropout, "attn_pdrop": c.attention_dropout_rate}
    fields |= {"resid_pdrop": c.dropout, "dtype": "float32"}
    names = [name for name, mlp in hf.ACTIVATIONS.items() if mlp == c.mlp]
    fields["activation_function"] = names[0]
    return fields


def _tokenizer_of(trained: Trained) -> Tokenizer | None:
    """Return the tokenizer beside the model, or GPT-2's for its vocabulary; None if unknown."""
    if trained.tokenizer_file.is_file():
        return tokenizers.load(trained.tokenizer_file)
    if trained.config.vocab_size not in PADDED_GPT2:
        return None
    try:
        return trained.tokenizer()
    except UserError as error:  # GPT-2's files cannot be downloaded
        warn(f"the export has no tokenizer, because {error}")
        return None


def _write_tokenizer(config: Config, tokenizer: Tokenizer | None, folder: Path) -> dict[str, Any]:
    """Write the tokenizer if there is one, and return fields of config.json.

    transformers reads only byte-pair encodings.
    """
    ids = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is None:
        return ids | {"jaxgpt_tokenizer": None}
    if not isinstance(tokenizer, BpeTokenizer):
        (folder / hf.OUR_TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        note = f"{hf.OUR_TOKENIZER}, of kind {tokenizer.kind}: transformers cannot read it"
        return ids | {"jaxgpt_tokenizer": note}
    bpe = bpe_library.Tokenizer.from_str(tokenizer.to_json())
    (folder / tokenizers.FILE).write_text(tokenizer.to_json(), encoding="utf-8")
    bpe.model.save(str(folder))  # vocab.json and merges.txt
    is_gpt2 = isinstance(bpe.pre_tokenizer, bpe_library.pre_tokenizers.ByteLevel)
    kind = "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"
    fields: dict[str, Any] = {"tokenizer_class": kind, "model_max_length": config.block_size}
    end = bpe.token_to_id(END_OF_TEXT)
    if end is not None:
        fields |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    return {"bos_token_id": end, "eos_token_id": end}
