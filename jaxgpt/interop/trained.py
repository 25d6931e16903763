"""Open a model that has been trained: that of a run, or the weights of a GPT-2."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.interop import huggingface
from jaxgpt.runtime import run_dir, storage
from jaxgpt.runtime.checkpoint import Checkpoints


class Trained(NamedTuple):
    """A model to sample or to evaluate, from a run or from weights."""

    config: Config
    load: Callable[[Mesh], tuple[dict[str, Any], int | None]]  # returns parameters; a run's step
    tokenizer: Callable[[], Tokenizer]
    tokenizer_file: Path  # beside the model; it may be missing


def open_trained(
    init_from: str,
    out_dir: str = "",
    checkpoint: str = "best",
    data_dir: str = "",
    config: type[Config] | str = "",
) -> Trained:
    """Open the model of a run if `init_from` is resume, else weights.

    `config` is the class of a run's config, or a config file that defines it. Raises `UserError`.
    """
    if init_from == "resume":
        of_run = run_dir.load_config(out_dir, config)
        of_run = of_run.replace(data_dir=data_dir or of_run.data_dir)
        load = partial(run_dir.load_params, of_run, checkpoint)
        file = storage.local(out_dir) / tokenizers.FILE
        return Trained(of_run, load, partial(tokenizers.load, file), file)
    weights = huggingface.open_weights(init_from)
    of_weights = Config(**weights.keys, data_dir=data_dir or "data")
    load = lambda mesh: (weights.load(of_weights, mesh), None)
    tokenizer = partial(weights.tokenizer, of_weights.data_dir)
    return Trained(of_weights, load, tokenizer, weights.tokenizer_file)


def resolve_initial_weights(
    config: Config, checkpoints: Checkpoints, given: frozenset[str]
) -> tuple[huggingface.Weights | run_dir.RunWeights | None, Config, list[str]]:
    """Return the weights that `init_from` names, or None, the config of the run, and log notes.

    The config takes the model's keys of the weights or of the run that is resumed. Positions past
    a smaller `block_size` are cut off. Raises `UserError` if the user asked for another model.
    """
    if config.init_from in ("scratch", "resume", "auto"):
        theirs = run_dir.saved_model(config, checkpoints)
        merged = run_dir.merge_model_keys(config, theirs, f"the run in {config.out_dir}", given)
        changed = [f"{k}={v}" for k, v in theirs.items() if v != getattr(config, k)]
        notes = [f"model of the run: {', '.join(changed)}"] if changed else []
        return None, merged, notes
    is_run = run_dir.is_run(config.init_from)
    weights = run_dir.open_weights(config) if is_run else huggingface.open_weights(config.init_from)
    positions = weights.keys["block_size"]
    theirs = weights.keys | {"block_size": min(positions, config.block_size)}
    required = huggingface.REQUIRED_KEYS | {"n_kv_head": 0} | theirs
    config = run_dir.merge_model_keys(config, required, config.init_from, given)
    model_keys = ", ".join(f"{key}={value}" for key, value in theirs.items())
    notes = [f"weights of {config.init_from}: {model_keys}"]
    if config.block_size < positions:
        notes.append(f"positions: the first {config.block_size} of {positions}")
    return weights, config, notes
