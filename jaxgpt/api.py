"""The Python API: train a config or load a trained model, then sample it and look inside.

N heads, L layers, T tokens of a text, V vocabulary without padding.
"""

import os
import signal
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt import kernels
from jaxgpt.config import (
    Checkpoint,
    Config,
    PositiveInt,
    Seed,
    UserError,
    check_value,
)
from jaxgpt.data.text_stream import generate_text
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.interop import huggingface
from jaxgpt.interop.trained import Trained, open_trained
from jaxgpt.kernels.platform import accum_dtype
from jaxgpt.model import GPT, abstract_model, unstack_layers
from jaxgpt.runtime import device as devices
from jaxgpt.runtime import distributed, run_dir, storage
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.runtime.metrics import Row, read_metrics
from jaxgpt.sample import Sampler, SamplingParams
from jaxgpt.train import train as train_to_the_end
from jaxgpt.train_step import cast_params

Text = TypeVar("Text", str, list[str])


class Options(TypedDict, total=False):
    """The options of `Run.generate`, for editors; `generate` checks their values."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


def train(config: Config) -> "Run":
    """Train `config` as `jaxgpt train` does, and return the run with its best weights.

    A run that took no step has no weights, so its `params` raise `UserError`.

    An interrupt (Ctrl-C, or the stop button of a notebook) saves a checkpoint and returns the run;
    a second one raises `KeyboardInterrupt` at once. After SIGTERM the run is saved, and then the
    signal has its usual effect. Raises `UserError` for a mistake in the config.
    """
    if not isinstance(config, Config):
        problem = f"is no Config, but of type {type(config).__name__}"
        raise UserError(f"config: {problem}; expected jaxgpt.Config(...)")
    c = config
    distributed.init_distributed(c.coordinator, c.num_processes, c.process_id, c.device)
    devices.start(c.device, float64=c.dtype == "float64")
    code = train_to_the_end(c, stop_signal=Interrupt)
    if code == 128 + signal.SIGTERM:
        signal.raise_signal(signal.SIGTERM)
    trained = open_trained("resume", c.out_dir, config=type(c))
    run = Run(trained, c.out_dir, device=c.device)
    if has_to_report(c, code):
        run.report()
    return run


def has_to_report(config: Config, code: int) -> bool:
    """Tell whether this process writes the report of a run that has ended with this exit code."""
    if not config.report or code != 0 or not distributed.is_process_0():
        return False
    return run_dir.open_checkpoints(config).latest() is not None  # else no step was taken


def load(
    source: str | os.PathLike,
    *,
    checkpoint: str | int = "best",
    config: type[Config] | str = Config,
) -> "Run":
    """Load a run directory, GPT-2's weights, or a ckpt.pt of nanoGPT.

    Weights are gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name of the Hugging Face hub, or a
    folder in its format. `checkpoint` of a run is best, latest, or a step. A run of a model of
    one's own needs its config class, or its config file, as `config`. Raises `UserError` for an
    unknown source, a run without an intact checkpoint, and a run of another config class.
    """
    name = os.fspath(source)
    if run_dir.is_run(name):
        step = check_value("checkpoint", str(checkpoint), Checkpoint)
        trained = open_trained("resume", name, step, config=config)
    elif checkpoint != "best" or config not in (Config, ""):
        problem = "is no run, and only a run has checkpoints and a config"
        raise UserError(f"{name}: {problem}; expected a run directory")
    elif Path(name).exists() or huggingface.is_on_hub(name):
        trained = open_trained(name)
    else:
        weights = f"a folder of weights, a ckpt.pt, or one of {', '.join(huggingface.HUB)}"
        raise UserError(f"{name}: no such run or weights; expected a run directory, {weights}")
    run = Run(trained, name)
    _ = run.params  # fails now, and not at the first use
    return run


class NoAttention(UserError):
    """A model of one's own computes no attention in `jaxgpt.kernels`."""


class Interrupt(distributed.StopSignal):
    """A stop signal whose second arrival does not end the process, which may be a notebook's."""

    def end_at_once(self, number: int) -> None:
        raise KeyboardInterrupt


class Run:
    """A trained model: its weights, config and tokenizer, from a run directory or from weights.

    A text is a string or an array of token ids. A notebook shows the run's loss.png. The weights
    are loaded when they are first used.
    """

    def __init__(self, trained: Trained, source: str, device: str = "auto", dtype: str = "auto"):
        self.source = source
        self.config = trained.config
        is_float64 = "float64" in (dtype, self.config.dtype)
        devices.start(device, float64=is_float64)
        self.inference_config = devices.inference_config(self.config, dtype, remat="none")
        self._trained = trained

    @cached_property
    def _params_and_step(self) -> tuple[dict[str, Any], int | None]:
        return self._trained.load(local_mesh())

    @property
    def params(self) -> dict[str, Any]:
        """The parameters: nested dicts of arrays."""
        return self._params_and_step[0]

    @property
    def step(self) -> int | None:
        """The checkpoint's step; None for weights that are not a run's."""
        return self._params_and_step[1]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with the methods `encode` and `decode`."""
        return self._trained.tokenizer()

    @property
    def metrics(self) -> list[Row]:
        """The rows of metrics.jsonl, as `pandas.DataFrame` takes them; empty for weights."""
        return read_metrics(storage.local(self.source) / "metrics.jsonl")

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler, which generates token ids."""
        return Sampler(self.inference_config).load(self.params)

    @overload
    def generate(
        self, prompt: Text, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Text: ...
    @overload
    def generate(
        self, prompt: Text, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[Text]: ...
    def generate(
        self, prompt: str | list[str], *, max_new_tokens: int = 500, temperature: float = 0.8,
        top_k: int = 200, top_p: float = 1.0, seed: int = 1337, stream: bool = False,
    ) -> Any:  # fmt: skip
        """Return the prompt and the text that continues it; for a list of prompts, a list.

        With `stream`, yield the same text piece by piece: first the prompt, then new text. Options
        have the defaults of `jaxgpt sample`, and give the same texts. Raises `UserError` for an
        option out of range, an empty prompt, and a character that has no token.
        """
        check_value("max_new_tokens", max_new_tokens, PositiveInt)
        check_value("seed", seed, Seed)
        options = {"sampling": SamplingParams(temperature, top_k, top_p), "seed": seed}
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not (isinstance(prompts, list) and prompts and all(isinstance(p, str) for p in prompts)):
            raise UserError(f"prompt={prompt!r}: invalid value; expected text, or a list of texts")
        new = generate_text(self.sampler, self.tokenizer, prompts, max_new_tokens, **options)
        pieces = chain([prompts], new)
        if isinstance(prompt, str):
            pieces = (piece for (piece,) in pieces)
            return pieces if stream else "".join(pieces)
        return pieces if stream else ["".join(parts) for parts in zip(*pieces, strict=True)]

    def logits(self, text: str | np.ndarray) -> np.ndarray:
        """Return the logits of the token after each token of the text, float32 [T, V]."""
        return np.asarray(_logits_TV(*self._network(), self._tokens_1T(text)))

    def loss(self, text: str | np.ndarray) -> np.ndarray:
        """Return the loss of each token of the text, in nats, float32 [T].

        `loss[t]` is -log p(token t | tokens 0 to t - 1). `loss[0]` is nan, because no token comes
        before the first one; `loss[1:].mean()` is the loss of the text.
        """
        return np.asarray(_losses_T(*self._network(), self._tokens_1T(text)))

    def attention(self, text: str | np.ndarray) -> np.ndarray:
        """Return the attention weights of every layer and head, float32 [L, N, T, T].

        Row t of the last two axes says how much token t attends to each token; it sums to 1.
        Raises `NoAttention`, a `UserError`, for a model that computes none in `jaxgpt.kernels`.
        """
        c, params = self._network()
        tokens_1T = self._tokens_1T(text)
        weights = _attention_weights(c.replace(attention="reference"), params, tokens_1T)
        shape = 1, c.n_head, tokens_1T.size, tokens_1T.size
        if [w.shape for w in weights] != c.n_layer * [shape]:
            problem = f"its model has no {c.n_layer} calls of attention in jaxgpt.kernels"
            expected = "one call of kernels.dot_product_attention per layer"
            raise NoAttention(f"{type(c).__name__}: {problem}; expected {expected}")
        return np.array([w[0] for w in weights], np.float32).reshape(c.n_layer, *shape[1:])

    def _network(self) -> tuple[Config, dict[str, Any]]:
        """Return the config and the parameters of a model that does not loop over its layers."""
        c, params = self.inference_config, self.params
        graphdef, shapes, _ = abstract_model(c)
        if c.scan_layers and isinstance(nnx.merge(graphdef, shapes), GPT):
            return c.replace(scan_layers=False), unstack_layers(params)
        return c, params

    def report(self, file: str | os.PathLike = "", *, prompt: str = "") -> Path:
        """Write a page about the run and its model, and return its path.

        If there is no `file`, it is report.html in the run directory. `prompt` is the text for
        which it shows attention; if empty, validation text. Raises `UserError` if the prompt is too
        long, the extra `report` is missing, or the file cannot be written.
        """
        from jaxgpt.tools.report import write_report

        return write_report([self], prompt, file)

    def _tokens_1T(self, text: str | np.ndarray) -> jax.Array:
        if not isinstance(text, str | np.ndarray):
            raise UserError(f"text={text!r}: invalid value; expected text, or an array of ids")
        ids = self.tokenizer.encode(text) if isinstance(text, str) else text
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            problem = f"an array of {ids.dtype} with shape {ids.shape}"
            raise UserError(f"text: {problem}; expected one row of integers")
        most, V = self.config.block_size, self.config.vocab_size
        if not 0 < len(ids) <= most:
            raise UserError(f"text: has {len(ids)} tokens; expected 1 to block_size={most} tokens")
        if ids.min() < 0 or ids.max() >= V:  # JAX would take other ids for these
            raise UserError(f"text: ids from {ids.min()} to {ids.max()}; expected 0 to {V - 1}")
        return jnp.asarray(ids[None], jnp.int32)

    def __repr__(self) -> str:
        return f"Run({self.source!r})"

    def _repr_png_(self) -> bytes | None:
        picture = storage.local(self.source) / "loss.png"
        return picture.read_bytes() if picture.is_file() else None


# ---- what a model computes for one text --------------------------------------------------------


def _merge(config: Config, params: dict[str, Any]) -> Any:
    return nnx.merge(abstract_model(config).graphdef, cast_params(params, config.dtype))


@partial(jax.jit, static_argnums=0)
def _logits_TV(config: Config, params: dict[str, Any], tokens_1T: jax.Array) -> jax.Array:
    logits_TV = _merge(config, params)(tokens_1T)[0, :, : config.vocab_size]
    return logits_TV.astype(accum_dtype(logits_TV))


@partial(jax.jit, static_argnums=0)
def _losses_T(config: Config, params: dict[str, Any], tokens_1T: jax.Array) -> jax.Array:
    logits_1TV = _merge(config, params)(tokens_1T)[:, :-1]
    losses_T: Any = kernels.token_losses(logits_1TV, tokens_1T[:, 1:])[0]
    return jnp.concatenate([jnp.full(1, jnp.nan, losses_T.dtype), losses_T])


@partial(jax.jit, static_argnums=0)
def _attention_weights(config: Config, params: dict[str, Any], tokens_1T: jax.Array) -> list:
    with kernels.recorded_attention() as weights:
        _merge(config, params)(tokens_1T)
    return weights
