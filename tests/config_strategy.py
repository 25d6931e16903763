"""Provide a Hypothesis strategy for valid configs."""

import math
import typing

from hypothesis import strategies as st

from jaxgpt.config import INT32_MAX, Config, Pattern, Range, key_types

HINTS = key_types(Config)
SMALL = st.integers(1, 9)


def allowed_values(hint) -> st.SearchStrategy:
    """Return a strategy for the values that an annotation allows."""
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


@st.composite
def configs(draw) -> Config:
    """Draw a valid Config: random fields, with dependent fields made compatible."""
    keys = {field: draw(allowed_values(HINTS[field])) for field in HINTS}
    kv_heads, group, width = draw(SMALL), draw(SMALL), draw(SMALL)
    keys["n_head"] = kv_heads * group
    keys["n_kv_head"] = draw(st.sampled_from([0, kv_heads]))
    keys["n_embd"] = kv_heads * group * width * (1 + (keys["position"] == "rope"))
    keys["sliding_window"] *= keys["causal"]
    keys["scan_layers"] &= keys["n_layer"] > 0
    keys["min_lr"] = min(keys["min_lr"], keys["learning_rate"])
    step_size = keys["batch_size"] * keys["block_size"]
    keys["batch_tokens"] = step_size * (keys["batch_tokens"] % (INT32_MAX // step_size + 1))
    return Config(**keys)
