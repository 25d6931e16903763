"""What a Config may hold: every field, every rule between fields, and the way through JSON."""

import dataclasses
import json
import math
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.config import Config, Pattern, Range, UserError, build

FIELDS = [field.name for field in dataclasses.fields(Config)]
DEFAULTS = Config().to_dict()


# ---- one field -------------------------------------------------------------------------------

# Field -> (a value that it may not have, what the message says is allowed).
BAD = {
    "out_dir": ("", "a folder"),
    "init_from": ("", "scratch, resume, auto, or the name of weights"),
    "overwrite": ("yes", "True or False"),
    "max_iters": (-1, "a whole number at least 0"),
    "eval_interval": (0, "a whole number at least 1"),
    "eval_iters": (-1, "a whole number at least 0"),
    "eval_only": (None, "True or False"),
    "log_interval": (0, "a whole number at least 1"),
    "sample_every": (-1, "a whole number at least 0"),
    "always_save_checkpoint": ("False", "True or False"),
    "save_interval": (-5, "a whole number at least 0"),
    "keep_checkpoints": (0, "a whole number at least 1"),
    "seed": (2**32, "a whole number from 0 to 4294967295"),
    "tensorboard": (0, "True or False"),
    "wandb_log": ("no", "True or False"),
    "wandb_project": ("", "a folder"),
    "wandb_run_name": (7, "text"),
    "dataset": ("../shakespeare", "a name, or names joined by /"),
    "data_dir": ("a\0b", "a folder"),
    "batch_size": (0, "a whole number at least 1"),
    "gradient_accumulation_steps": (0, "a whole number at least 1"),
    "batch_tokens": (-1, "a whole number at least 0"),
    "data_on_device": (True, "one of auto, always, never"),
    "vocab_size": (-1, "a whole number at least 0"),
    "block_size": (0, "a whole number at least 1"),
    "n_layer": (1.5, "a whole number at least 0"),
    "n_head": (0, "a whole number at least 1"),
    "n_kv_head": (-1, "a whole number at least 0"),
    "n_embd": (0, "a whole number at least 1"),
    "mlp_dim": (-1, "a whole number at least 0"),
    "dropout": (1.0, "a number from 0 to 1 exclusive"),
    "embed_dropout": (0.2, "True or False"),
    "attention_dropout": (1, "True or False"),
    "bias": ("True", "True or False"),
    "qkv_bias": (0, "True or False"),
    "head_bias": (1, "True or False"),
    "norm": ("batchnorm", "one of layernorm, rmsnorm, none"),
    "norm_position": ("before", "one of pre, post"),
    "position": ("alibi", "one of learned, sinusoidal, rope, none"),
    "mlp": ("GELU", "one of gelu, gelu_tanh, relu, relu2, swiglu, none"),
    "residual": ("no", "True or False"),
    "out_projection": (None, "True or False"),
    "score_scale": ("heads", "one of head, embedding"),
    "init": ("xavier", "one of gpt2, torch"),
    "tie_embeddings": (1.0, "True or False"),
    "qk_norm": (1, "True or False"),
    "logit_softcap": (-0.1, "a number at least 0"),
    "sliding_window": (-1, "a whole number at least 0"),
    "causal": ([], "True or False"),
    "value_residual": ("", "True or False"),
    "zero_init_projections": (0, "True or False"),
    "optimizer": ("adam", "one of adamw, muon"),
    "document_mask": (1, "True or False"),
    "eot_id": (-2, "a whole number at least -1"),
    "learning_rate": (-6e-4, "a number at least 0"),
    "decay_lr": (2, "True or False"),
    "lr_schedule": ("linear", "one of cosine, wsd"),
    "decay_fraction": (1.5, "a number from 0 to 1"),
    "warmup_iters": (-1, "a whole number at least 0"),
    "lr_decay_iters": (-1, "a whole number at least 0"),
    "min_lr": (-1e-9, "a number at least 0"),
    "weight_decay": ("0.1", "a number at least 0"),
    "decay_all": (0.1, "True or False"),
    "beta1": (1.0, "a number from 0 to 1 exclusive"),
    "beta2": (1.5, "a number from 0 to 1 exclusive"),
    "grad_clip": (-1.0, "a number at least 0"),
    "device": ("cuda:0", "one of auto, cpu, gpu, cuda, tpu"),
    "on_cpu": ("auto", "True or False"),
    "dtype": ("float16", "one of auto, float32, bfloat16, float64"),
    "mesh": ("data=2", "axis:size[,axis:size]"),
    "attention": ("flash", "one of auto, reference, cpu, xla, cudnn, splash"),
    "remat": (False, "one of none, dots, full"),
    "scan_layers": (0, "True or False"),
    "digits": (0, "a whole number from 1 to 9"),
    "early_stopping_patience": (-1, "a whole number at least 0"),
    "freeze": (3, "text"),
    "max_nonfinite_steps": (-1, "a whole number at least 0"),
    "coordinator": ("localhost", "host:port"),
    "num_processes": (-1, "a whole number at least 0"),
    "process_id": (-2, "a whole number at least -1"),
    "steps_per_call": (-1, "a whole number at least 0"),
}


def refusal(**keys) -> str:
    with pytest.raises(UserError) as raised:
        Config(**keys)
    return str(raised.value)


def test_every_field_has_a_bad_value():
    assert BAD.keys() == set(FIELDS)


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_is_refused_by_name_with_what_is_allowed(field):
    value, allowed = BAD[field]
    assert refusal(**{field: value}) == f"{field}={value!r}: must be {allowed}"


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_another_type_is_taken_for_the_fields_own(field):
    """Python's True is 1, 1 == 1.0 and nan compares with nothing: none of it slips through."""
    others = {
        bool: [0, 1, 0.0, "True", None],
        int: [True, False, 1.0, math.nan, math.inf, "1", None],
        float: [True, False, math.nan, math.inf, -math.inf, 10**400, "0.5", None],
        str: [0, True, None, b"auto", ["auto"], {}],
    }
    for value in others[type(DEFAULTS[field])]:
        assert refusal(**{field: value}).startswith(f"{field}={value!r}: must be ")


@pytest.mark.parametrize("field", [f for f in FIELDS if type(DEFAULTS[f]) is float])
def test_a_whole_number_is_taken_for_a_real_one(field):
    value = getattr(Config(**{"min_lr": 0, field: 0}), field)
    assert value == 0
    assert type(value) is float


def test_numbers_have_no_end_where_none_is_named():
    assert Config(max_iters=10**400).max_iters == 10**400
    assert Config(learning_rate=1e308).learning_rate == 1e308


# ---- fields together -------------------------------------------------------------------------

# (keys that do not go together, what the message says)
TOGETHER = [
    ({"n_embd": 100, "n_head": 12}, "n_embd=100: must be a multiple of n_head=12"),
    ({"n_kv_head": 5}, "n_kv_head=5: must divide n_head=12"),
    ({"n_kv_head": 24}, "n_kv_head=24: must divide n_head=12"),
    (
        {"position": "rope", "n_head": 3, "n_embd": 9},
        "position='rope': needs an even head width, and n_embd / n_head is 3",
    ),
    ({"sliding_window": 8, "causal": False}, "sliding_window=8: needs causal=True"),
    (
        {"min_lr": 2e-3, "learning_rate": 1e-3},
        "min_lr=0.002: must be at most learning_rate=0.001",
    ),
    (
        {"batch_tokens": 100, "batch_size": 4, "block_size": 8},
        "batch_tokens=100: must be a multiple of batch_size x block_size = 32",
    ),
]


@pytest.mark.parametrize(("keys", "message"), TOGETHER, ids=[m for _, m in TOGETHER])
def test_keys_that_do_not_go_together_are_refused_whichever_comes_last(keys, message):
    assert refusal(**keys) == message
    with pytest.raises(UserError, match=re.escape(message)):
        build(keys)
    for last, value in keys.items():
        others = {k: v for k, v in keys.items() if k != last}
        try:
            config = Config(**others)
        except UserError:
            continue  # refused already: beside the default of the last key
        with pytest.raises(UserError, match=re.escape(message)):
            config.replace(**{last: value})


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
def test_the_same_keys_are_allowed_where_the_rule_holds(keys):
    assert Config().replace(**keys).to_dict() == DEFAULTS | keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("n_heads", "n_head"),
        ("lerning_rate", "learning_rate"),
        ("batchsize", "batch_size"),
        ("drop_out", "dropout"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    for make in (build, lambda keys: Config().replace(**keys)):
        with pytest.raises(UserError, match=f"^{key}: .*did you mean {nearest}\\?$"):
            make({key: 1})


def test_a_key_like_no_other_is_refused_without_a_guess():
    with pytest.raises(UserError) as raised:
        build({"zzzzzz": 1})
    assert str(raised.value) == "zzzzzz: there is no such key"


# ---- all configs -----------------------------------------------------------------------------


def allowed_values(hint) -> st.SearchStrategy:
    """Values that an annotation allows."""
    kind, *rules = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is bool:
        return st.booleans()
    if not rules:
        return st.text()
    (rule,) = rules
    if isinstance(rule, Pattern):
        return st.from_regex(rule.pattern, fullmatch=True)
    assert isinstance(rule, Range)
    high = rule.high if rule.high < math.inf else None
    if kind is int:
        return st.integers(rule.low, high)
    return st.floats(rule.low, high, exclude_max=rule.below_high, allow_infinity=False)


HINTS = typing.get_type_hints(Config, include_extras=True)
SMALL = st.integers(1, 9)


@st.composite
def configs(draw) -> Config:
    """Any Config: fields at random, those that hang together made to fit."""
    keys = {field: draw(allowed_values(HINTS[field])) for field in FIELDS}
    kv_heads, group, width = draw(SMALL), draw(SMALL), draw(SMALL)
    keys["n_head"] = kv_heads * group
    keys["n_kv_head"] = draw(st.sampled_from([0, kv_heads]))
    keys["n_embd"] = kv_heads * group * width * (1 + (keys["position"] == "rope"))
    keys["sliding_window"] *= keys["causal"]
    keys["zero_init_projections"] &= keys["init"] == "gpt2"
    keys["min_lr"] = min(keys["min_lr"], keys["learning_rate"])
    keys["batch_tokens"] *= keys["batch_size"] * keys["block_size"]
    return Config(**keys)


@given(configs())
def test_a_config_is_the_same_after_a_way_through_json(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = build(json.loads(text))
    assert again == config
    assert [type(v) for v in again.to_dict().values()] == [type(v) for v in DEFAULTS.values()]
    assert list(json.loads(text)) == FIELDS


@given(configs(), configs())
def test_replace_takes_over_every_key(config, other):
    assert config.replace(**other.to_dict()) == other
    assert config.replace() == config


def test_replace_leaves_the_config_it_starts_from():
    config = Config(n_layer=3)
    assert config.replace(n_layer=4).n_layer == 4
    assert config.n_layer == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 5


# ---- derived values --------------------------------------------------------------------------


@given(configs())
def test_heads_fill_the_width_and_groups_share_keys_and_values(config):
    assert config.head_dim * config.n_head == config.n_embd
    assert config.n_head % config.kv_heads == 0
    assert config.n_kv_head in (0, config.kv_heads)
    assert config.replace(n_kv_head=0).kv_heads == config.n_head


@given(st.integers(0, 10**6))
def test_the_vocabulary_is_padded_to_the_next_multiple_of_128(vocab_size):
    padded = Config(vocab_size=vocab_size).padded_vocab_size
    assert padded % 128 == 0
    assert vocab_size <= padded < vocab_size + 128


@given(st.integers(1, 10**5))
def test_the_mlp_is_four_times_as_wide_and_swiglu_two_thirds_of_that(n_embd):
    config = Config(n_embd=n_embd, n_head=1)
    assert config.mlp_hidden_dim == 4 * n_embd
    width = config.replace(mlp="swiglu").mlp_hidden_dim
    assert width % 64 == 0
    assert 8 * n_embd <= 3 * width < 8 * n_embd + 3 * 64
    for mlp in "relu", "swiglu":
        assert config.replace(mlp=mlp, mlp_dim=5).mlp_hidden_dim == 5
