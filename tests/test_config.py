"""Test Config: every key, rules between keys, the JSON round trip, and subclasses."""

import dataclasses
import json
import math
import os
import typing

import pytest
from config_strategy import configs
from flax import nnx
from helpers import refusal
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.config import OLD_KEYS, Config, Range, UserError
from jaxgpt.model import GPT

KEYS = [field.name for field in dataclasses.fields(Config)]
DEFAULTS = Config().to_dict()


# (keys of one kind, an invalid value, the allowed values as the message names them)
KINDS = [
    ("max_iters eval_iters sample_every save_interval profile early_stopping_patience batch_tokens "
     "vocab_size n_layer n_kv_head mlp_dim sliding_window warmup_iters lr_decay_iters "
     "max_nonfinite_steps num_processes steps_per_call momentum_warmup_iters", -1,
     "a whole number from 0 to 2147483647"),
    ("eval_interval log_interval keep_checkpoints batch_size gradient_accumulation_steps "
     "block_size n_head n_embd", 0, "a whole number from 1 to 2147483647"),
    ("eot_id process_id", -2, "a whole number from -1 to 2147483647"),
    ("digits", 10, "a whole number from 1 to 9"),
    ("train_digits", 10, "a whole number from 0 to 9"),
    ("muon_iterations", 6, "a whole number from 1 to 5"),
    ("seed", 2**32, "a whole number from 0 to 4294967295"),
    ("learning_rate min_lr weight_decay grad_clip logit_softcap target_val_loss "
     "skip_loss_spikes", -1e-9, "a number at least 0"),
    ("dropout beta1 beta2", 1.0, "a number from 0 to below 1"),
    ("decay_fraction", 1.5, "a number from 0 to 1"),
    ("spike_window", 1, "a whole number from 2 to 2147483647"),
    ("working reverse_digits random_offset "
     "overwrite report eval_only always_save_checkpoint tensorboard wandb_log attention_dropout "
     "bias tie_embeddings qk_norm causal value_residual document_mask zero_init_projections "
     "align_documents decay_lr use_cpu_variant scan_layers shard_optimizer deterministic norm_gain "
     "cautious_weight_decay muon_per_head", "yes",
     "True or False"),
    ("out_dir wandb_project", "", "non-empty text in UTF-8"),
    ("data_dir", "a\0b", "non-empty text in UTF-8"),
    ("wandb_run_name freeze", 7, "text"),
    ("init_from", "", "scratch, resume, auto, or the name of weights"),
    ("dataset", "../shakespeare", "a name, or names joined by /"),
    ("data_on_device", True, "one of auto, always, never"),
    ("norm", "batchnorm", "one of layernorm, rmsnorm"),
    ("norm_position", "before", "one of pre, post"),
    ("position", "alibi", "one of learned, sinusoidal, rope, none"),
    ("mlp", "GELU", "one of gelu, gelu_tanh, relu, relu2, swiglu"),
    ("optimizer", "adam", "one of adamw, muon, normuon"),
    ("muon_polynomial", "cubic", "one of jordan, polar_express"),
    ("lr_schedule", "linear", "one of cosine, wsd"),
    ("device", "cuda:0", "one of auto, cpu, gpu, cuda, tpu"),
    ("dtype", "float16", "one of auto, float32, bfloat16, float64"),
    ("mesh", "data=2", "axis:size[,axis:size]"),
    ("attention", "Flash", "one of auto, reference, cpu, xla, cudnn, flash, splash"),
    ("xla", True, "one of tuned, default"),
    ("remat", False, "one of none, dots, full"),
    ("coordinator", "localhost", "host:port"),
]  # fmt: skip
BAD = {key: (value, allowed) for keys, value, allowed in KINDS for key in keys.split()}


def test_bad_values_cover_every_key():
    assert BAD.keys() == set(KEYS)


@pytest.mark.parametrize("key", BAD)
def test_bad_value_is_rejected_with_the_allowed_values(key):
    value, allowed = BAD[key]
    assert refusal(Config, **{key: value}) == f"{key}={value!r}: invalid value; expected {allowed}"


@pytest.mark.parametrize("key", KEYS)
def test_value_of_another_type_is_rejected(key):
    """In Python True == 1, 1 == 1.0 and nan equals nothing, so range checks are not enough."""
    others = {
        bool: [0, 1, 0.0, "True", None],
        int: [True, False, 1.0, math.nan, math.inf, "1", None],
        float: [True, False, math.nan, math.inf, -math.inf, 10**400, "0.5", None],
        str: [0, True, None, b"auto", ["auto"], {}],
    }
    for value in others[type(DEFAULTS[key])]:
        assert refusal(Config, **{key: value}).startswith(
            f"{key}={value!r}: invalid value; expected "
        )


@pytest.mark.parametrize("key", [key for key in KEYS if type(DEFAULTS[key]) is float])
def test_integer_is_accepted_for_a_float_key(key):
    assert repr(getattr(Config(**{"min_lr": 0, key: 0}), key)) == "0.0"


def test_whole_numbers_fit_into_the_int32_of_compiled_programs():
    most = 2**31 - 1
    assert Config(max_iters=most).max_iters == most
    message = refusal(Config, max_iters=most + 1)
    assert message.endswith("expected a whole number from 0 to 2147483647")


def test_numbers_without_a_bound_may_be_huge():
    assert Config(learning_rate=1e308).learning_rate == 1e308


def test_run_directory_needs_a_name_in_utf8():
    """The name is printed, and written to the log and to loss.png."""
    message = refusal(Config, out_dir=os.fsdecode(b"out/\xff"))
    assert message.startswith("out_dir='out/\\udcff': invalid value; expected non-empty text in")


# (incompatible keys, message)
TOGETHER = [
    ({"scan_layers": True, "n_layer": 0},
     "scan_layers=True: n_layer=0 has no blocks to scan; expected scan_layers=False"),
    ({"n_embd": 100, "n_head": 12},
     "n_head=12: does not divide n_embd=100; expected a divisor; try n_head=10"),
    ({"n_kv_head": 5}, "n_kv_head=5: does not divide n_head=12; expected a divisor"),
    ({"n_kv_head": 24}, "n_kv_head=24: does not divide n_head=12; expected a divisor"),
    ({"position": "rope", "n_head": 3, "n_embd": 9},
     "position='rope': n_embd / n_head is 3, which is odd; expected an even head dim"),
    ({"sliding_window": 8, "causal": False},
     "sliding_window=8: an encoder has no window; expected causal=True, or sliding_window=0"),
    ({"min_lr": 2e-3, "learning_rate": 1e-3},
     "min_lr=0.002: above the peak; expected at most learning_rate=0.001; try min_lr=0.0001"),
    ({"batch_tokens": 100, "batch_size": 4, "block_size": 8},
     "batch_tokens=100: is no whole number of micro-batches; "
     "expected a multiple of batch_size x block_size = 32"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), TOGETHER, ids=[m for _, m in TOGETHER])
def test_incompatible_keys_are_rejected_in_any_order(keys, message):
    assert refusal(Config, **keys) == refusal(Config.from_dict, keys) == message
    for last, value in keys.items():
        others = {k: v for k, v in keys.items() if k != last}
        try:
            config = Config(**others)
        except UserError:
            continue  # the default of the last key is refused too
        assert refusal(config.replace, **{last: value}) == message


@pytest.mark.parametrize(
    "keys",
    [
        {"n_kv_head": 4},
        {"position": "rope", "n_head": 3, "n_embd": 12},
        {"sliding_window": 8},
        {"min_lr": 2e-3, "learning_rate": 1e-3, "decay_lr": False},
        {"min_lr": 1e-3, "learning_rate": 1e-3},
        {"batch_tokens": 96, "batch_size": 4, "block_size": 8},
    ],
    ids=str,
)
def test_compatible_keys_are_accepted(keys):
    assert Config().replace(**keys).to_dict() == DEFAULTS | keys


NEAREST = {"n_heads": "n_head", "lerning_rate": "learning_rate", "batchsize": "batch_size"}


@pytest.mark.parametrize("key", [*NEAREST, "zzzzzz"])
def test_unknown_key_is_rejected_with_nearest_name(key):
    hint = NEAREST.get(key, "--help, which lists all keys")
    for message in refusal(Config.from_dict, {key: 1}), refusal(Config().replace, **{key: 1}):
        assert message == f"{key}: unknown key; try {hint}"


def test_old_key_names_are_accepted():
    for old, key in OLD_KEYS.items():
        assert old not in KEYS
        message = refusal(Config.from_dict, {old: BAD[key][0]})
        assert message.startswith(f"{key}=")  # it reaches the new key, and its check
    config = Config.from_dict({"n_inner": 5, "on_cpu": False})
    assert config.to_dict() == DEFAULTS | {"mlp_dim": 5, "use_cpu_variant": False}


@given(configs())
def test_config_round_trips_through_json(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = Config.from_dict(json.loads(text))
    assert again == config
    assert [type(v) for v in again.to_dict().values()] == [type(v) for v in DEFAULTS.values()]
    assert list(json.loads(text)) == KEYS


@pytest.mark.slow
@given(configs(), configs())
def test_replace_returns_a_new_config_and_keeps_the_original(config, other):
    before = config.to_dict()
    assert config.replace(**other.to_dict()) == other
    assert config.replace() == config
    assert config.to_dict() == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 5


@given(configs())
def test_head_counts_divide_evenly_and_kv_heads_default_to_n_head(config):
    assert config.head_dim * config.n_head == config.n_embd
    assert config.n_head % config.kv_heads == 0
    assert config.n_kv_head in (0, config.kv_heads)
    assert config.replace(n_kv_head=0).kv_heads == config.n_head


@given(st.integers(0, 10**6))
def test_vocabulary_is_padded_to_the_next_multiple_of_128(vocab_size):
    padded = Config(vocab_size=vocab_size).padded_vocab_size
    assert padded % 128 == 0
    assert vocab_size <= padded < vocab_size + 128


@given(st.integers(1, 10**5))
def test_default_mlp_width_is_4_n_embd_and_about_two_thirds_of_that_for_swiglu(n_embd):
    config = Config(n_embd=n_embd, n_head=1)
    assert config.mlp_hidden_dim == 4 * n_embd
    width = config.replace(mlp="swiglu").mlp_hidden_dim
    assert width % 64 == 0
    assert 8 * n_embd <= 3 * width < 8 * n_embd + 3 * 64
    for mlp in "relu", "swiglu":
        assert config.replace(mlp=mlp, mlp_dim=5).mlp_hidden_dim == 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideConfig(Config):
    """A config with new keys, and with a core key of another default and range."""

    width: typing.Annotated[int, Range(1, 64)] = 8
    mode: typing.Literal["a", "b"] = "a"
    n_layer: typing.Annotated[int, Range(1)] = 2

    def validate(self) -> None:
        super().validate()
        if self.mode == "b" and self.width % 2:
            raise UserError(f"width={self.width}: odd; expected an even number with mode='b'")


def test_config_subclass_keeps_class_and_keys():
    config = WideConfig(width=9, seed=3)
    assert config.to_dict() == DEFAULTS | {"width": 9, "mode": "a", "n_layer": 2, "seed": 3}
    again = WideConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    wider = config.replace(width=10)
    assert (type(wider), wider.width, wider.seed) == (WideConfig, 10, 3)
    assert WideConfig.from_dict({"n_inner": 5}).mlp_dim == 5
    assert set(WideConfig.model_keys()) - set(Config.model_keys()) == {"width", "mode"}
    assert not {"seed", "learning_rate", "device"} & set(WideConfig.model_keys())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"width": 65}, "width=65: invalid value; expected a whole number from 1 to 64"),
        ({"mode": "c"}, "mode='c': invalid value; expected one of a, b"),
        ({"n_layer": 0}, "n_layer=0: invalid value; expected a whole number at least 1"),
        ({"width": 9, "mode": "b"}, "width=9: odd; expected an even number with mode='b'"),
        ({"n_kv_head": 5}, "n_kv_head=5: does not divide n_head=12; expected a divisor"),
        ({"widht": 9}, "widht: unknown key; try width"),
    ],
    ids=str,
)
def test_config_subclass_validates_new_and_inherited_keys(keys, message):
    for told in refusal(WideConfig.from_dict, keys), refusal(WideConfig().replace, **keys):
        assert told == message


def test_key_of_unsupported_type_is_rejected():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ListConfig(Config):
        sizes: dict = dataclasses.field(default_factory=dict)

    assert refusal(ListConfig).startswith("sizes: unsupported type ")


def test_default_hooks_make_a_gpt_and_decay_only_kernels():
    config = Config(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=16)
    model = config.make_model(nnx.Rngs(0))
    assert type(model) is GPT
    params = {"embed": {"kernel": 0}, "ln_f": {"scale": 1, "bias": 2}}
    mask = {"embed": {"kernel": True}, "ln_f": {"scale": False, "bias": False}}
    assert config.weight_decay_mask(params) == mask


def test_config_file_is_kept_by_replace_and_ignored_by_equality():
    config = Config().replace(config_file="mine.py")
    assert config == Config()
    assert config.replace(seed=3).config_file == "mine.py"
    assert "config_file" not in config.to_dict()
