"""Test that a run that resumes names the keys that changed, and what they do to the data."""

from types import SimpleNamespace

import pytest
from helpers import make_config

from jaxgpt.runtime.resume import describe_changes

STEP = 10
SAVED = make_config(batch_size=4, gradient_accumulation_steps=2)
KEPT = "; the order of the data is the same"
# changed keys -> what the line says after the step
CHANGES = {
    "learning_rate": ({"learning_rate": 0.5}, f"learning_rate=0.5 (was 0.01){KEPT}"),
    "same product": (
        {"batch_size": 8, "gradient_accumulation_steps": 1},
        f"batch_size=8 (was 4), gradient_accumulation_steps=1 (was 2){KEPT}",
    ),
    "more": (
        {"batch_size": 6},
        "batch_size=6 (was 4); the data continues at sequence 120 of its order, not 80: "
        "40 are skipped",
    ),
    "fewer": (
        {"gradient_accumulation_steps": 1},
        "gradient_accumulation_steps=1 (was 2); the data continues at sequence 40 of its order, "
        "not 80: 40 are repeated",
    ),
    "tokens": (
        {"batch_tokens": 4 * 8 * 3},
        "batch_tokens=96 (was 0); the data continues at sequence 120 of its order, not 80: "
        "40 are skipped",
    ),
    "seed": (
        {"seed": 2},
        "seed=2 (was 1337); seed: another order of the data from here on, which may repeat "
        "sequences",
    ),
    "problems": (
        {"train_digits": 2},
        "train_digits=2 (was 0); train_digits: another order of the data from here on, which may "
        "repeat sequences",
    ),
    "two": (
        {"seed": 2, "dataset": "song", "batch_size": 6},
        "dataset=song (was openwebtext), batch_size=6 (was 4), seed=2 (was 1337); seed and "
        "dataset: another order of the data from here on, which may repeat sequences",
    ),
}


def describe(step: int = STEP, **keys) -> list[str]:
    checkpoints = SimpleNamespace(meta={STEP: {"config": SAVED.to_dict()}}.__getitem__)
    return describe_changes(SAVED.replace(**keys), checkpoints, step)


@pytest.mark.parametrize("name", CHANGES)
def test_changed_keys_are_named_in_one_line_with_their_effect_on_the_order(name):
    keys, said = CHANGES[name]
    (line,) = describe(**keys)
    start = f"changed since step {STEP}: "
    assert line.startswith(start)
    named, effect = line.removeprefix(start).split("; ")
    expected, what = said.split("; ")
    assert (sorted(named.split(", ")), effect) == (sorted(expected.split(", ")), what)


@pytest.mark.parametrize("keys", [{}, {"out_dir": "moved", "init_from": "auto"}], ids=str)
def test_unchanged_run_and_fresh_run_say_nothing(keys):
    assert describe(**keys) == []
    assert describe(step=0, seed=2) == []
