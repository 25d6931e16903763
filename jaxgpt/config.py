"""What a run is: one flat table of keys, from a Python file and the command line, checked.

The keys live in five frozen dataclasses, `Run`, `Data`, `Model`, `Optimizer` and `Parallel`; a
`Config` is all five at once, so a function that needs only the model's keys takes a `Model`.
Names that nanoGPT has mean here what they mean there. The text under a key is its `--help`.
"""

import dataclasses
import difflib
import math
import re
import sys
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal


class UserError(ValueError):
    """A mistake the user can mend: shown as one line, exit code 2, no traceback."""


@dataclass(frozen=True)
class Range:
    """The numbers a key may take: from `low` to `high`, which may itself be left out."""

    low: float = -math.inf
    high: float = math.inf
    below_high: bool = False

    def __contains__(self, value: float) -> bool:
        top = value < self.high if self.below_high else value <= self.high
        return abs(value) < math.inf and self.low <= value and top

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low}"
        return f"from {self.low} to {self.high}" + (" exclusive" if self.below_high else "")


@dataclass(frozen=True)
class Pattern:
    """The strings a key may take: those that match `pattern` as a whole, as `means` puts it."""

    pattern: str
    means: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.means


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, below_high=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX would take it modulo 2**32
NonEmptyStr = Annotated[str, Pattern(r"[^\0]+", "a folder")]
InitFrom = Annotated[str, Pattern(r"[^\0]+", "scratch, resume, auto, or the name of weights")]
Name = Annotated[str, Pattern(r"\w[\w.+-]*(/\w[\w.+-]*)*", "a name, or names joined by /")]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, how long it goes on, and what it says on the way."""

    out_dir: NonEmptyStr = "out"
    """The run directory: config, metrics, picture, log and checkpoints."""
    init_from: InitFrom = "scratch"
    """`resume` goes on from the newest checkpoint; `auto` does if there is one. Else the weights
    to begin with: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder of a GPT-2 or of a run."""
    overwrite: bool = False
    """Let `scratch` delete the run that `out_dir` holds."""
    max_iters: NonNegativeInt = 600_000
    """Optimizer steps in all."""
    eval_interval: PositiveInt = 2000
    """Steps between evaluations; each one also redraws the picture and may save."""
    eval_iters: NonNegativeInt = 200
    """Random batches an evaluation takes from each split; 0 takes the whole splits instead."""
    eval_only: bool = False
    """Evaluate once and stop."""
    log_interval: PositiveInt = 1
    """Steps between lines of the log."""
    sample_every: NonNegativeInt = 0
    """Evaluations between short samples in the log; 0 is none."""
    always_save_checkpoint: bool = True
    """Save at every evaluation; False saves only where the validation loss improves."""
    early_stopping_patience: NonNegativeInt = 0
    """Evaluations in a row without a lower validation loss that end the run; 0 is none."""
    save_interval: NonNegativeInt = 0
    """Steps between further saves, apart from evaluations; 0 is none."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept on disk, beside the best one."""
    seed: Seed = 1337
    """Decides initial weights, order of the data and dropout."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the extra `log`)."""
    wandb_log: bool = False
    """Also log to Weights & Biases, offline too (needs the extra `log`)."""
    wandb_project: NonEmptyStr = "jaxgpt"
    """Project name at Weights & Biases."""
    wandb_run_name: str = ""
    """Run name at Weights & Biases; empty is the name of `out_dir`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, and how many of them a step sees."""

    dataset: Name = "openwebtext"
    """Folder in `data_dir` with token files; a known corpus is prepared on first use. `adder` and
    `calculator` are problems of arithmetic, made as they are needed."""
    data_dir: NonEmptyStr = "data"
    """Where datasets live. nanoGPT's own `data` folder can be named here."""
    digits: Annotated[int, Range(1, 9)] = 3
    """Digits of the numbers that `dataset=adder` and `dataset=calculator` reckon with, at most."""
    batch_size: PositiveInt = 12
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: PositiveInt = 40
    """Micro-batches in a step, over all devices together."""
    batch_tokens: NonNegativeInt = 0
    """TokenSplit a step, instead of `gradient_accumulation_steps`; 0 leaves that key in charge."""
    data_on_device: Literal["auto", "always", "never"] = "auto"
    """Hold the token files in device memory; `auto` does while they are small beside it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. The defaults are GPT-2 124M's."""

    vocab_size: NonNegativeInt = 0
    """Token ids; 0 is as many as the dataset has. Rows are padded to a multiple of 128."""
    block_size: PositiveInt = 1024
    """TokenSplit of context."""
    n_layer: NonNegativeInt = 12
    """Transformer blocks; 0 is a bigram model."""
    n_head: PositiveInt = 12
    """Query heads; their width is n_embd / n_head."""
    n_kv_head: NonNegativeInt = 0
    """Key and value heads, shared by groups of query heads; 0 is as many as n_head."""
    n_embd: PositiveInt = 768
    """Width of the residual stream."""
    mlp_dim: NonNegativeInt = 0
    """Width inside the MLP; 0 is 4 n_embd (swiglu: 8/3 n_embd, up to a multiple of 64)."""
    dropout: Fraction = 0.0
    """Fraction of activations zeroed: embeddings, attention weights, and what a branch's last map
    gives."""
    embed_dropout: bool = True
    """Dropout of embeddings too, as in GPT-2; the lecture has none there."""
    attention_dropout: bool = True
    """Dropout of attention weights too, as in GPT-2. Flash kernels of GPUs and TPUs have none."""
    bias: bool = True
    """Biases in linear maps and layer norms. GPT-2 has them; nanoGPT's default is False."""
    qkv_bias: bool = True
    """With `bias`: biases of query, key and value too. The lecture's heads have none."""
    head_bias: bool = False
    """A bias of the output map, one number a token; GPT-2 has none."""
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """Normalisation."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise what enters a branch (GPT-2) or what leaves the addition (the 2017 paper)."""
    position: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    """How the model knows where a token stands."""
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "none"] = "gelu_tanh"
    """Non-linearity; `none` leaves the MLP out. GPT-2's is gelu_tanh, nanoGPT's is gelu."""
    residual: bool = True
    """Add a branch to what entered it; False, as in the lecture's first stages, replaces that."""
    out_projection: bool = True
    """Mix attention's heads by an output map; False only concatenates them."""
    score_scale: Literal["head", "embedding"] = "head"
    """Whose width's square root divides attention scores; `embedding` is a slip of the lecture."""
    init: Literal["gpt2", "torch"] = "gpt2"
    """Initial weights: GPT-2's, or what PyTorch's Linear and Embedding start with."""
    tie_embeddings: bool = True
    """Use the token embedding as the output map too."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, with a learned gain."""
    logit_softcap: NonNegativeFloat = 0.0
    """Bound logits to c tanh(logits / c); 0 is no bound."""
    sliding_window: NonNegativeInt = 0
    """Keys a query sees at most, itself included; 0 is all before it."""
    causal: bool = True
    """Hide the future. False is an encoder, which cannot be sampled."""
    value_residual: bool = False
    """Mix the first layer's values into every layer's by a learned share."""
    document_mask: bool = False
    """In training and evaluation, hide from each document those before it in its window."""
    eot_id: Annotated[int, Range(-1)] = -1
    """Where document_mask lets a document begin; -1 is the end-of-text of the dataset."""
    zero_init_projections: bool = False
    """Begin with each branch's last map at zero, so that a block first passes on what it gets."""

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def attention_dropout_rate(self) -> float:
        """Fraction of attention weights zeroed."""
        return self.dropout if self.attention_dropout else 0.0

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def mlp_hidden_dim(self) -> int:
        """`mlp_dim`, or its default for the kind of MLP."""
        default = 4 * self.n_embd if self.mlp != "swiglu" else -(-8 * self.n_embd // 3 // 64) * 64
        return self.mlp_dim or default

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` up to a multiple of 128, the width of a TPU lane."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the blocks' matrices; AdamW keeps all else. Both share
    the learning rate and the decay; Muon's momentum is 0.95."""
    learning_rate: NonNegativeFloat = 6e-4
    """Peak learning rate."""
    decay_lr: bool = True
    """Linear warm-up, then decay to `min_lr`; False holds `learning_rate` from the first step."""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """How it decays: along a cosine, or not until the last steps and then along a line (wsd)."""
    decay_fraction: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of all steps over which wsd decays."""
    warmup_iters: NonNegativeInt = 2000
    """Steps of warm-up."""
    lr_decay_iters: NonNegativeInt = 0
    """Step at which the learning rate reaches `min_lr`; 0 is `max_iters`."""
    min_lr: NonNegativeFloat = 6e-5
    """Learning rate at the end of the decay."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices and embeddings."""
    decay_all: bool = False
    """Decay biases and norms too, as PyTorch's AdamW does unless told which."""
    beta1: Fraction = 0.9
    """Memory of the gradient's mean."""
    beta2: Fraction = 0.95
    """Memory of the gradient's square."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 is no bound."""
    freeze: str = ""
    """Hold parameters in whose path this regular expression is found, as embed|blocks/[0-3]/ is;
    empty is none. A path is like blocks/0/attn/qkv/kernel."""
    max_nonfinite_steps: NonNegativeInt = 0
    """Steps in a row that may be skipped since their loss or gradient is not finite; one more, or
    with 0 the first, ends the run."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """What runs it, and how. Nothing here changes what is computed beyond rounding."""

    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"
    """What to run on; `auto` takes an accelerator if JAX finds one."""
    on_cpu: bool = True
    """Without an accelerator, run the config file's `on_cpu` variant if it has one."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute type; weights and statistics stay float32. `auto`: bfloat16, but float32 on a CPU."""
    mesh: Annotated[str, Pattern(r"(\w+:\d+(,\w+:\d+)*)?", "axis:size[,axis:size]")] = ""
    """Devices by axis (data, fsdp, tensor), as in data:2,fsdp:4; empty is all of them on data."""
    attention: Literal["auto", "reference", "cpu", "xla", "cudnn", "splash"] = "auto"
    """Attention back end; `auto` takes the fastest one that the device and the model allow."""
    remat: Literal["none", "dots", "full"] = "none"
    """What to recompute in the backward pass to save memory: nothing, all but matmuls, all."""
    scan_layers: bool = False
    """Compile one block and loop over it: quicker to compile, often slower to run."""
    coordinator: Annotated[str, Pattern(r"([^:\s]+:\d+)?", "host:port")] = ""
    """Address of the first of several processes; Slurm, Open MPI 4 and TPU pods need none."""
    num_processes: NonNegativeInt = 0
    """How many processes take part, where `coordinator` is given."""
    process_id: Annotated[int, Range(-1)] = -1
    """Which of them this one is, from 0, where `coordinator` is given."""
    steps_per_call: NonNegativeInt = 0
    """Steps handed to the device in one call; 0 is 10 where that is quick and its tokens are on the
    device, else 1."""


GROUPS = (RunConfig, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig):
    """A whole run. Raises `UserError`, naming key, value and what is allowed, when it cannot be."""

    def __post_init__(self):
        check(self)
        _check_together(self)

    def replace(self, **keys: Any) -> "Config":
        """This config with other values for some keys."""
        return build(self.to_dict() | keys)

    def make_model(self, rngs: Any) -> Any:
        """Build the model, a Flax NNX module."""
        from jaxgpt.model import GPT

        return GPT(self, rngs=rngs)

    def weight_decay_mask(self, params: dict) -> dict:
        """Return a tree of bools: decay matrices and embeddings, and not biases or gains."""
        import jax

        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, ready for JSON."""
        return dataclasses.asdict(self)


def build(keys: dict[str, Any]) -> Config:
    """A Config of these keys. Raises `UserError`, with the nearest name, for an unknown one."""
    known = {field.name for field in dataclasses.fields(Config)}
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"{key}: there is no such key{hint}")
    return Config(**keys)


def check(keys: Any) -> None:
    """Raises `UserError` for the first field of a dataclass that its annotation does not allow."""
    for key, hint in typing.get_type_hints(type(keys), include_extras=True).items():
        object.__setattr__(keys, key, _checked(key, getattr(keys, key), hint))


def _checked(key: str, value: Any, hint: Any) -> Any:
    """`value`, if the annotation `hint` allows it; a whole number passes as a float."""
    kind, *notes = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    rules: list[Any] = [note for note in notes if isinstance(note, Range | Pattern)]
    if typing.get_origin(kind) is tuple:
        return value
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        raise UserError(f"{key}={value!r}: must be one of {', '.join(choices)}")
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) is kind and all(value in rule for rule in rules):
        return value
    noun = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[kind]
    allowed = rules[0] if kind is str and rules else " ".join([noun, *map(str, rules)])
    raise UserError(f"{key}={value!r}: must be {allowed}")


def _check_together(c: Config) -> None:
    """Raises `UserError` where keys that are each allowed do not go together."""

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    heads, kv_heads = c.n_head, c.kv_heads
    need(
        c.n_embd % heads == 0,
        f"n_embd={c.n_embd}: must be a multiple of n_head={heads}",
    )
    need(
        heads % kv_heads == 0,
        f"n_kv_head={c.n_kv_head}: must divide n_head={heads}",
    )
    need(
        c.position != "rope" or c.head_dim % 2 == 0,
        f"position='rope': needs an even head width, and n_embd / n_head is {c.head_dim}",
    )
    need(
        c.causal or not c.sliding_window,
        f"sliding_window={c.sliding_window}: needs causal=True",
    )
    need(
        c.init == "gpt2" or not c.zero_init_projections,
        f"init={c.init!r}: must be gpt2 with zero_init_projections=True",
    )
    need(
        c.min_lr <= c.learning_rate or not c.decay_lr,
        f"min_lr={c.min_lr}: must be at most learning_rate={c.learning_rate}",
    )
    need(
        c.batch_tokens % (c.batch_size * c.block_size) == 0,
        f"batch_tokens={c.batch_tokens}: must be a multiple of batch_size x block_size = "
        f"{c.batch_size * c.block_size}",
    )
