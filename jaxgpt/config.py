"""Define the config of a run: one flat table of keys with types, ranges, defaults and help.

Five frozen dataclasses hold the keys, and `Config` inherits from all five. A function that needs
only the model's keys takes a `ModelConfig`. nanoGPT's keys keep their names and meaning. The text
under a key is its `--help`. A config file may subclass `Config` (docs/extending.md).
"""

import dataclasses
import difflib
import math
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self


class UserError(ValueError):
    """A mistake that the user can fix. Commands print it as one line and exit with code 2."""


@dataclass(frozen=True)
class Range:
    """Allow finite numbers from `low` to `high`; with `below_high`, not `high` itself."""

    low: float = -math.inf
    high: float = math.inf
    below_high: bool = False

    def __contains__(self, value: float) -> bool:
        top = value < self.high if self.below_high else value <= self.high
        return abs(value) < math.inf and self.low <= value and top

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low}"
        return f"from {self.low} to " + ("below " if self.below_high else "") + f"{self.high}"


@dataclass(frozen=True)
class Pattern:
    """Allow strings that match the whole `pattern`; `means` describes them in errors."""

    pattern: str
    means: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.means


INT32_MAX = 2**31 - 1  # the largest step, size or id of the compiled programs
PositiveInt = Annotated[int, Range(1, INT32_MAX)]
NonNegativeInt = Annotated[int, Range(0, INT32_MAX)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, below_high=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX would silently reduce it modulo 2**32
NonEmptyStr = Annotated[str, Pattern(r"[^\0\ud800-\udfff]+", "non-empty text in UTF-8")]
InitFrom = Annotated[str, Pattern(r"[^\0]+", "scratch, resume, auto, or the name of weights")]
Checkpoint = Annotated[str, Pattern(r"best|latest|\d+", "best, latest, or a step")]
DATASET_NAME = Pattern(r"\w[\w.+-]*(/\w[\w.+-]*)*", "a name, or names joined by /")
Name = Annotated[str, DATASET_NAME]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run directory, the length of the run, and what it logs and saves."""

    out_dir: NonEmptyStr = "out"
    """The run directory: config, metrics, picture, log and checkpoints. It is a folder, or
    s3://bucket/path or gs://bucket/path (needs the extra `cloud`)."""
    init_from: InitFrom = "scratch"
    """`scratch` starts a new run; `resume` continues from the newest checkpoint; `auto` resumes if
    there is a checkpoint. Other values name the initial weights: gpt2, gpt2-medium, gpt2-large,
    gpt2-xl, a folder of a GPT-2 or of a run, or nanoGPT's ckpt.pt."""
    overwrite: bool = False
    """Allow a new run to delete the run that is in `out_dir`."""
    max_iters: NonNegativeInt = 600_000
    """Optimizer steps in total."""
    eval_interval: PositiveInt = 2000
    """Steps between evaluations; each evaluation also redraws loss.png and may save."""
    eval_iters: NonNegativeInt = 200
    """Random batches per split in an evaluation; 0 evaluates the whole splits."""
    eval_only: bool = False
    """Evaluate once and stop."""
    log_interval: PositiveInt = 1
    """Steps between log lines."""
    sample_every: NonNegativeInt = 0
    """Evaluations between short samples in the log; 0 turns samples off."""
    always_save_checkpoint: bool = True
    """Save at every evaluation; False saves only when the validation loss improves."""
    early_stopping_patience: NonNegativeInt = 0
    """Stop after this many evaluations in a row without a lower validation loss; 0 means never."""
    target_val_loss: NonNegativeFloat = 0.0
    """Stop at the first evaluation whose validation loss is at most this, and log the time that it
    took; 0 means never."""
    save_interval: NonNegativeInt = 0
    """Steps between saves, in addition to those at evaluations; 0 adds none."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    seed: Seed = 1337
    """Seed of the initial weights, the data order and dropout."""
    report: bool = False
    """Write report.html after the last step (needs the extra `report`). An encoder, `eval_only`
    and a run of several processes cannot have this page."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the extra `log`)."""
    wandb_log: bool = False
    """Also log to Weights & Biases, online or offline (needs the extra `log`)."""
    wandb_project: NonEmptyStr = "jaxgpt"
    """Project name at Weights & Biases."""
    wandb_run_name: str = ""
    """Run name at Weights & Biases; if empty, the name of `out_dir`."""
    profile: NonNegativeInt = 0
    """Training steps to trace, after the first two calls: a trace and a table of the most expensive
    operations in `out_dir`/profile. 0 traces none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The tokens to train on, and how many per step."""

    dataset: Name = "openwebtext"
    """Folder in `data_dir` with token files; a known corpus is prepared on first use. `adder` and
    `calculator` are arithmetic problems, generated on the fly."""
    data_dir: NonEmptyStr = "data"
    """Folder of all datasets; nanoGPT's own `data` folder works too. Datasets at
    s3://bucket/path or gs://bucket/path are copied to this machine (needs the extra `cloud`)."""
    digits: Annotated[int, Range(1, 9)] = 3
    """Maximum number of digits in problems of `dataset=adder` and `dataset=calculator`."""
    train_digits: Annotated[int, Range(0, 9)] = 0
    """Maximum number of digits in training problems; held-out problems have up to `digits`. 0 means
    `digits`."""
    random_offset: bool = False
    """Move the digits of a training sum or difference up by a random number of places, so that
    shorter numbers also train the places of longer ones. Needs `train_digits` below `digits`."""
    working: bool = False
    """Write the working of a problem, digit by digit, before its answer."""
    reverse_digits: bool = True
    """In the working and in the answer, write the units of each number first, because carries go
    from the units upwards."""
    batch_size: PositiveInt = 12
    """Largest number of sequences that a device processes at a time."""
    gradient_accumulation_steps: PositiveInt = 40
    """A step has batch_size x gradient_accumulation_steps sequences, on any number of devices."""
    batch_tokens: NonNegativeInt = 0
    """Tokens per step, in place of `gradient_accumulation_steps`; 0 uses that key."""
    align_documents: bool = False
    """Start every training window at the start of a document; the rest of a document that is longer
    than the window is left out. Needs an end-of-text id, as document_mask does."""
    data_on_device: Literal["auto", "always", "never"] = "auto"
    """Keep the tokens in device memory; `auto` keeps them there if they need at most an eighth of
    it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network; the defaults are GPT-2 124M."""

    vocab_size: NonNegativeInt = 0
    """Number of token ids; 0 takes the dataset's. The embedding's rows are padded to a multiple of
    128."""
    block_size: PositiveInt = 1024
    """Context length in tokens."""
    n_layer: NonNegativeInt = 12
    """Transformer blocks; 0 is a bigram model."""
    n_head: PositiveInt = 12
    """Query heads; the head dim is n_embd / n_head."""
    n_kv_head: NonNegativeInt = 0
    """Key and value heads, shared by groups of query heads; 0 means n_head."""
    n_embd: PositiveInt = 768
    """Width of the residual stream."""
    mlp_dim: NonNegativeInt = 0
    """Width of the MLP's hidden layer; 0 means 4 n_embd (swiglu: 8/3 n_embd, rounded up to a
    multiple of 64)."""
    dropout: Fraction = 0.0
    """Fraction of activations zeroed: embeddings, attention weights and the output of each
    residual branch."""
    attention_dropout: bool = True
    """Also apply dropout to attention weights, as GPT-2 does. Of the flash kernels, only
    attention=flash supports it."""
    bias: bool = True
    """Biases in linear layers and layer norms. GPT-2 has them; nanoGPT's default is False."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Type of normalisation."""
    norm_gain: bool = True
    """Learned gains of the norms of the residual stream; norms without gains have no bias."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise the input of each branch (GPT-2) or the sum after it (the 2017 paper)."""
    position: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    """Position encoding."""
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = "gelu_tanh"
    """Non-linearity of the MLP. GPT-2's is gelu_tanh, nanoGPT's is gelu."""
    tie_embeddings: bool = True
    """Share the token embedding with the output layer."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, with a learned gain."""
    logit_softcap: NonNegativeFloat = 0.0
    """Soft cap c: logits become c tanh(logits / c); 0 turns it off."""
    sliding_window: NonNegativeInt = 0
    """Maximum number of keys that a query attends to, its own included; 0 means all."""
    causal: bool = True
    """Mask later tokens. False makes an encoder, which cannot be sampled. Its input contains the
    tokens that it has to predict."""
    value_residual: bool = False
    """Mix the first layer's values into every layer's values, by a learned weight."""
    document_mask: bool = False
    """In training and evaluation, let tokens attend only within their own document."""
    eot_id: Annotated[int, Range(-1, INT32_MAX)] = -1
    """Token id of the end-of-text, which separates documents for document_mask and align_documents;
    -1 means the tokenizer's."""
    zero_init_projections: bool = False
    """Initialise the last layer of each residual branch to zero, so blocks start as identity."""

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def attention_dropout_rate(self) -> float:
        return self.dropout if self.attention_dropout else 0.0

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def mlp_hidden_dim(self) -> int:
        swiglu_dim = math.ceil(self.n_embd * 8 / 3 / 64) * 64
        return self.mlp_dim or (swiglu_dim if self.mlp == "swiglu" else 4 * self.n_embd)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of a TPU's 128 lanes."""
        return math.ceil(self.vocab_size / 128) * 128


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon", "normuon"] = "adamw"
    """`muon` orthogonalises the updates of the blocks' matrices and uses AdamW for the rest. Both
    share learning rate and weight decay; Muon's momentum is 0.95. `normuon` also divides the update
    of each output neuron by its running RMS, with the decay rate beta2."""
    muon_polynomial: Literal["jordan", "polar_express"] = "jordan"
    """The polynomials by which Muon orthogonalises: those of Jordan et al. (2024), or those of
    Amsel et al. (2025), which bring singular values nearer to 1."""
    muon_iterations: Annotated[int, Range(1, 5)] = 5
    """Number of Newton-Schulz iterations: Muon applies the first so many of its five polynomials.
    Fewer take less time and leave singular values further from 1."""
    muon_per_head: bool = False
    """Let Muon orthogonalise the maps of each attention head separately, which takes less time."""
    momentum_warmup_iters: NonNegativeInt = 0
    """Steps in which Muon's momentum rises from 0.85 to 0.95; 0 turns this warm-up off."""
    learning_rate: NonNegativeFloat = 6e-4
    """Peak learning rate."""
    decay_lr: bool = True
    """Warm up linearly, then decay to `min_lr`; False keeps `learning_rate` constant."""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """Shape of the decay: a cosine, or constant and linear over the last steps (wsd)."""
    decay_fraction: Annotated[float, Range(0, 1)] = 0.2
    """wsd decays over this fraction of lr_decay_iters, at the end."""
    warmup_iters: NonNegativeInt = 2000
    """Warm-up steps."""
    lr_decay_iters: NonNegativeInt = 0
    """Step at which the learning rate reaches `min_lr`; 0 means `max_iters`."""
    min_lr: NonNegativeFloat = 6e-5
    """Learning rate at the end of the decay."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    cautious_weight_decay: bool = False
    """Decay only the weights that the update makes smaller too."""
    beta1: Fraction = 0.9
    """Decay rate of Adam's first moment."""
    beta2: Fraction = 0.95
    """Decay rate of Adam's second moment."""
    grad_clip: NonNegativeFloat = 1.0
    """Maximum gradient norm; 0 turns clipping off."""
    freeze: str = ""
    """Freeze parameters whose path contains a match of this regular expression, such as
    embed|blocks/[0-3]/. A path looks like blocks/0/attn/qkv/kernel. Empty freezes none."""
    max_nonfinite_steps: NonNegativeInt = 0
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more
    ends the run. 0 means that the first such step ends it."""
    skip_loss_spikes: NonNegativeFloat = 0.0
    """Skip the update of a step whose loss or gradient norm exceeds the mean of the last
    `spike_window` steps by this many standard deviations; levanter and MaxText use 6. 0 skips
    none."""
    spike_window: Annotated[int, Range(2, INT32_MAX)] = 128
    """Number of steps that `skip_loss_spikes` compares with. The first `spike_window` steps are
    never skipped."""

    @property
    def uses_muon(self) -> bool:
        return self.optimizer in ("muon", "normuon")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The hardware and how to use it."""

    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"
    """Device to run on; `auto` takes an accelerator if JAX finds one."""
    use_cpu_variant: bool = True
    """On a CPU, run the config file's `cpu_config` if it has one."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype; weights and statistics stay float32. `auto` is float32 on a CPU and bfloat16
    elsewhere."""
    mesh: Annotated[str, Pattern(r"(\w+:\d+(,\w+:\d+)*)?", "axis:size[,axis:size]")] = ""
    """Devices per axis (data, fsdp, tensor), as in data:2,fsdp:4; empty puts all devices on
    data."""
    shard_optimizer: bool = False
    """Split the optimizer's moments and its update over the mesh axis data (ZeRO-1); every device
    still holds whole parameters."""
    attention: Literal["auto", "reference", "cpu", "xla", "cudnn", "flash", "splash"] = "auto"
    """Attention back end; `auto` takes the fastest that this device and model support. cudnn and
    flash are for NVIDIA GPUs, splash is for TPUs."""
    xla: Literal["tuned", "default"] = "tuned"
    """XLA's options for the training step: `tuned` sets those that help on this hardware, `default`
    sets none. Options in XLA_FLAGS take precedence."""
    deterministic: bool = False
    """Use only kernels that add in a fixed order, so that a run that resumes on a GPU repeats every
    bit; slower. CPUs need no such kernels."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes to save memory: nothing, all but matmuls, or everything."""
    scan_layers: bool = False
    """Compile one block and loop over it: faster to compile, often slower to run."""
    coordinator: Annotated[str, Pattern(r"([^:\s]+:\d+)?", "host:port")] = ""
    """Address of process 0 in a multi-process run; Slurm, Open MPI 4, Kubernetes and TPU pods need
    none."""
    num_processes: NonNegativeInt = 0
    """Number of processes, if `coordinator` is given."""
    process_id: Annotated[int, Range(-1, INT32_MAX)] = -1
    """Index of this process, from 0, if `coordinator` is given."""
    steps_per_call: NonNegativeInt = 0
    """Steps per call of the compiled program; 0 means 10 if steps are short and the data is on the
    device, else 1."""


# Old names of keys, in early files of format 1 (docs/file_formats.md).
OLD_KEYS = {
    "n_inner": "mlp_dim", "attention_window": "sliding_window", "decay_share": "decay_fraction",
    "skip_nonfinite": "max_nonfinite_steps", "early_stop": "early_stopping_patience",
    "on_cpu": "use_cpu_variant", "tokens_on_device": "data_on_device",
    "steps_per_dispatch": "steps_per_call",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig):
    """The config of a run. Raises `UserError` for an invalid key or value."""

    config_file: ClassVar[str] = ""
    """The file that built this config. It is not a key, so it does not take part in comparisons."""
    training_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a subclass that do not describe the model, so that a resumed run may change them."""
    parts: ClassVar[dict[str, dict[str, Any]]] = {}
    """Names of the parts of a recipe, and the keys that take each out (`jaxgpt ablate`)."""

    def __new__(cls, **keys: Any) -> Self:  # before __init__, which would raise TypeError
        for key in keys:
            if key not in key_types(cls):
                raise cls.unknown_key(key)
        return super().__new__(cls)

    def __post_init__(self):
        check(self)
        self.validate()

    @classmethod
    def from_dict(cls, keys: dict[str, Any]) -> Self:
        """Return a config with these keys, which may have old names, and perhaps a `config_file`.

        Raises `UserError` for an unknown key, with the nearest name.
        """
        current = {}
        for key, value in keys.items():
            if key not in ("config_file", "config_class"):
                name = key if key in key_types(cls) else OLD_KEYS.get(key, key)
                current[name] = value
        config = cls(**current)
        object.__setattr__(config, "config_file", keys.get("config_file", ""))
        return config

    @classmethod
    def unknown_key(cls, key: str) -> UserError:
        nearest = difflib.get_close_matches(key, key_types(cls), n=1)
        hint = nearest[0] if nearest else "--help, which lists all keys"
        return UserError(f"{key}: unknown key; try {hint}")

    def replace(self, **keys: Any) -> Self:
        """Return this config with other values for some keys."""
        return self.from_dict({"config_file": self.config_file} | self.to_dict() | keys)

    def to_dict(self) -> dict[str, Any]:
        """Return every key with its value, ready for JSON."""
        return {key: getattr(self, key) for key in key_types(type(self))}

    @classmethod
    def model_keys(cls) -> list[str]:
        """Return the keys that describe the model: those of `ModelConfig` and of a subclass."""
        others = key_types(Config).keys() - key_types(ModelConfig).keys()
        return [key for key in key_types(cls) if key not in {*others, *cls.training_keys}]

    def check_absent(self, absent: Iterable[str], model: str) -> None:
        """Raise `UserError` if a key that `model` does not have is not at its default."""
        for key in absent:
            value, expected = getattr(self, key), getattr(type(self), key)
            if value != expected:
                problem = f"{model} does not have this key"
                advice = f"expected {expected!r}; try {key}={expected}"
                raise UserError(f"{key}={value!r}: {problem}; {advice}")

    def validate(self) -> None:
        """Raise `UserError` for keys that contradict each other. A subclass may add checks."""
        c = self
        microbatch_tokens = c.batch_size * c.block_size
        if c.n_embd % c.n_head:
            raise UserError(
                f"n_head={c.n_head}: does not divide n_embd={c.n_embd}; expected a divisor; "
                f"try n_head={max(n for n in range(1, c.n_head) if c.n_embd % n == 0)}"
            )
        if c.scan_layers and not c.n_layer:
            raise UserError(
                "scan_layers=True: n_layer=0 has no blocks to scan; expected scan_layers=False"
            )
        if c.n_head % c.kv_heads:
            raise UserError(
                f"n_kv_head={c.n_kv_head}: does not divide n_head={c.n_head}; expected a divisor"
            )
        if c.position == "rope" and c.head_dim % 2:
            raise UserError(
                f"position='rope': n_embd / n_head is {c.head_dim}, which is odd; "
                "expected an even head dim"
            )
        if c.sliding_window and not c.causal:
            raise UserError(
                f"sliding_window={c.sliding_window}: an encoder has no window; expected "
                "causal=True, or sliding_window=0"
            )
        if c.decay_lr and c.min_lr > c.learning_rate:
            raise UserError(
                f"min_lr={c.min_lr}: above the peak; expected at most "
                f"learning_rate={c.learning_rate}; try min_lr={c.learning_rate / 10:g}"
            )
        if c.batch_tokens % microbatch_tokens:
            raise UserError(
                f"batch_tokens={c.batch_tokens}: is no whole number of micro-batches; expected a "
                f"multiple of batch_size x block_size = {microbatch_tokens}"
            )

    # A subclass in a config file may override these (docs/extending.md).

    def make_model(self, rngs: Any) -> Any:
        """Build the model: an `nnx.Module`, called as `model(tokens_BT, dropout) -> logits_BTV`.

        Evaluation and sampling call it without `dropout`.
        """
        from jaxgpt.model import GPT

        return GPT(self, rngs=rngs)

    def weight_decay_mask(self, params: Any) -> Any:
        """Return which parameters decay, a tree of bools like `params`; here, every `kernel`."""
        import jax

        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def learning_rate_scale(self, params: Any) -> Any:
        """Return a factor of the learning rate for each parameter, or None if all are 1."""
        return None

    def phases(self) -> Mapping[int, Self]:
        """Return the config of each phase of training, by the phase's first step.

        The training step is compiled once per phase. The phases' models have the same parameters.
        """
        return {0: self}


@cache
def key_types(keys_class: type) -> dict[str, Any]:
    """Return the annotation of every field of a dataclass, in order."""
    hints = typing.get_type_hints(keys_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(keys_class)}


def check(keys: Any) -> None:
    """Raise `UserError` for a value that its annotation does not allow; convert ints to floats."""
    for key, hint in key_types(type(keys)).items():
        object.__setattr__(keys, key, check_value(key, getattr(keys, key), hint))


def check_value(key: str, value: Any, hint: Any) -> Any:
    """Return `value`, as a float if `hint` is float. Raises `UserError` if `hint` forbids it."""
    kind, *notes = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    rules: list[Any] = [note for note in notes if isinstance(note, Range | Pattern)]
    if typing.get_origin(kind) is tuple:  # of a flag that may be given several times
        return value
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        choices = ", ".join(map(str, choices))
        raise UserError(f"{key}={value!r}: invalid value; expected one of {choices}")
    nouns = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    if kind not in nouns:
        raise UserError(
            f"{key}: unsupported type {kind}; expected int, float, bool, str or Literal"
        )
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) is kind and all(value in rule for rule in rules):
        return value
    allowed = rules[0] if kind is str and rules else " ".join([nouns[kind], *map(str, rules)])
    raise UserError(f"{key}={value!r}: invalid value; expected {allowed}")
