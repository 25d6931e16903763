"""Test arithmetic problems against Python's operators, the held-out set and a trained model.

U steps per call, M micro-batches per step, B sequences per micro-batch, T length.
"""

import operator
import re

import numpy as np
import pytest
from helpers import refusal
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.cli import commands as cli
from jaxgpt.config import Config
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.batches import Batches
from jaxgpt.data.prepare import find_dataset, prepare
from jaxgpt.data.tasks import TASKS, Arithmetic, Problems, TrainProblems, ValProblems
from jaxgpt.data.text_stream import TextStream
from jaxgpt.data.tokenizer import ArithmeticTokenizer
from jaxgpt.evaluate import full_split
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.tools import evaluation
from jaxgpt.train import train

PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
ALL = [("adder", 1), ("adder", 3), ("calculator", 1), ("calculator", 2), ("calculator", 9)]


def task_of(name: str, digits: int) -> Arithmetic:
    return Arithmetic(TASKS[name], digits)


def spelled(task: Arithmetic, problems: Problems, length: int) -> list[tuple[str, str]]:
    """Return the problem and the answer of each window, as the characters that are trained on."""
    alphabet, pairs = task.tokenizer.chars, []
    for row in task.windows(problems, length):
        targets = np.flatnonzero(row >= 0)
        assert (np.diff(targets) == 1).all()
        assert {alphabet[~id] for id in row[targets[-1] + 1 :]} <= {"\n"}
        read = "".join(alphabet[id if id >= 0 else ~id] for id in row)
        pairs.append((read[: targets[0]], read[targets[0] : targets[-1] + 1]))
    return pairs


def triples(problems: Problems) -> set[tuple[int, int, int]]:
    return set(zip(*(x.tolist() for x in problems), strict=True))


def make_config(**keys) -> Config:
    model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 9, "batch_size": 8}
    return Config(**{"dataset": "adder", "digits": 2, "mesh": "data:1"} | model | keys)


@pytest.mark.parametrize(("name", "digits"), ALL)
def test_windows_hold_problems_and_answers_with_reversed_digits(name, digits):
    task = task_of(name, digits)
    problems = task.draw(np.arange(3000, dtype=np.uint64))
    for ask, said in spelled(task, problems, task.longest + 2):
        a, sign, b = re.fullmatch(r"(\d+)(\D)(\d+)=", ask).groups()
        assert len(a) == len(b) == digits
        answer = str(PYTHON[sign](int(a), int(b)))
        minus = "-" if answer.startswith("-") else ""
        assert said == minus + answer.removeprefix("-")[::-1] + "\n"


@pytest.mark.parametrize(("name", "digits"), ALL)
def test_longest_problem_has_exactly_the_declared_length(name, digits):
    task, top = task_of(name, digits), 10**digits - 1
    kinds = np.arange(len(task.operations))
    largest = Problems(kinds, np.full(len(kinds), top), np.full(len(kinds), top))
    smallest = largest._replace(a=np.zeros(len(kinds), int))
    pairs = spelled(task, largest, task.longest) + spelled(task, smallest, task.longest)
    assert max(len(ask + said) for ask, said in pairs) == task.longest
    assert max(len(said) for _, said in pairs) == task.longest_answer


@pytest.mark.parametrize(("name", "digits"), ALL)
def test_drawn_operations_and_number_lengths_have_expected_frequencies(name, digits):
    task = task_of(name, digits)
    kind, a, b = task.draw(np.arange(20_000, dtype=np.uint64))
    operations = len(task.operations)
    np.testing.assert_allclose(np.bincount(kind) / len(kind), 1 / operations, atol=0.03)
    below = [(np.maximum(a, b) < 10**n).mean() for n in range(1, digits + 1)]
    odds = np.diff((np.arange(digits + 1) / digits) ** 2)  # of the larger of two even draws
    lengths = np.arange(1, digits + 1)
    expected = [(odds * np.minimum(1, 100.0 ** (n - lengths))).sum() for n in lengths]
    np.testing.assert_allclose(below, expected, atol=0.05)  # fewer of the short, held out


@pytest.mark.parametrize(("name", "digits"), ALL)
def test_held_out_problems_and_mirror_images_are_never_drawn(name, digits):
    task = task_of(name, digits)
    held = triples(task.held_out)
    mirrored = {(kind, b, a) for kind, a, b in held}
    for seed in (0, 1):
        endless = TrainProblems(task)
        samples = np.arange(100_000, dtype=np.uint64)
        keys = endless.starts(samples, block_size=9, seed=seed, stream=seed)
        drawn = triples(task.draw(keys.view(np.uint64)))
        assert not drawn & (held | mirrored)
    if digits == 1:  # all others are
        numbers = [(a, b) for a in range(10) for b in range(10)]
        every = {(k, a, b) for k in range(len(task.operations)) for a, b in numbers}
        every -= {(kind, a, b) for kind, a, b in every if kind == 3 and b == 0}
        assert drawn == every - held - mirrored


COUNTS = [
    ("adder", 1, {1: 5}),
    ("adder", 3, {1: 5, 2: 500, 3: 10_000}),
    ("calculator", 2, {1: 5, 2: 500}),
]


@pytest.mark.parametrize(("name", "digits", "counts"), COUNTS)
def test_every_operation_and_length_has_held_out_problems(name, digits, counts):
    task = task_of(name, digits)
    kind, a, b = task.held_out
    assert len(triples(task.held_out)) == len(kind)
    for n, count in counts.items():
        for operation in range(len(task.operations)):
            below = ((kind == operation) & (np.maximum(a, b) < 10**n)).sum()
            assert 0.9 * count < below <= sum(counts.values())
    lengths = np.array([len(str(max(pair))) for pair in zip(a, b, strict=True)])
    first, second = np.array_split(lengths == digits, 2)  # well mixed
    assert abs(first.mean() - second.mean()) < 0.1 or len(lengths) < 100


@given(st.integers(0, 200), st.integers(1, 30))
def test_held_out_split_yields_problems_in_order(first, count):
    task = task_of("adder", 2)
    split, samples = ValProblems(task, 9), np.arange(first, first + count, dtype=np.uint64)
    rows = task.windows(task.held_out, 10)
    windows = split.windows(split.starts(samples, block_size=9, seed=3, stream=2), 10)
    np.testing.assert_array_equal(windows, rows[samples.astype(int) % len(rows)])


def test_full_split_yields_every_held_out_problem_once():
    task, mesh = task_of("calculator", 1), make_mesh(make_config())
    batches = full_split(ValProblems(task, 9), mesh, 4, 9)
    windows = np.concatenate([np.asarray(b)[:count].reshape(-1, 10) for b, count in batches])
    expected = task.windows(task.held_out, 10)
    np.testing.assert_array_equal(windows[: len(expected)], expected)
    assert (windows[len(expected) :] < 0).all()


def test_batches_depend_only_on_seed_step_and_stream():
    dataset, mesh = find_dataset(make_config(), 9), make_mesh(make_config())

    def take(step: int, shape_UMB: tuple, *, seed: int = 5, on=mesh, stream: int = 0):
        batches = Batches(dataset.train, on, shape_UMB, block_size=9, seed=seed, stream=stream)
        return np.asarray(batches.get(step))

    several = take(6, (4, 1, 8))
    for step in range(4):  # a call equals its single steps; micro-batches and meshes split a step
        np.testing.assert_array_equal(take(6 + step, (1, 1, 8))[0], several[step])
    np.testing.assert_array_equal(take(6, (4, 2, 4)).reshape(4, 1, 8, 10), several)
    eight = make_mesh(make_config(mesh="data:4,fsdp:2"))
    np.testing.assert_array_equal(take(6, (4, 1, 8), on=eight), several)
    for other in (take(7, (4, 1, 8)), take(6, (4, 1, 8), seed=6), take(6, (4, 1, 8), stream=1)):
        assert (other != several).any()


def test_drawn_and_held_out_problems_match_recorded_values():
    """Otherwise a run resumed on another machine would train on other, even held-out, problems."""
    task = task_of("calculator", 2)
    keys = TrainProblems(task).starts(np.arange(4), block_size=9, seed=1, stream=0)
    drawn = [ask for ask, _ in spelled(task, task.draw(keys.view(np.uint64)), 11)]
    held = [ask for ask, _ in spelled(task, task.held_out, 11)[:4]]
    assert drawn == ["68+23=", "47*06=", "71*97=", "37/04="]
    assert held == ["87+15=", "07/84=", "13*49=", "96-88="]


def test_decoded_text_shows_answers_in_normal_digit_order(tmp_path):
    (tmp_path / "t.json").write_text(ArithmeticTokenizer("+-", 2).to_json())
    tokenizer = tokenizers.load(tmp_path / "t.json")
    ids = {char: id for id, char in enumerate("\n+-0123456789=")}
    assert [ids[char] for char in "07-35="] == tokenizer.encode("7-35=").tolist()
    assert tokenizer.decode([ids[char] for char in "07-35=-82\n00+00=0\n"]) == "7-35=-28\n0+0=0\n"
    stream, shown = TextStream(tokenizer, tokenizer.stop), []
    answer = [ids[char] for char in "-82\n0"]
    for n in range(1, 6):
        shown.append(stream.push(answer[:n]))
    assert shown == ["-", "", "", "28", ""]
    assert stream.stopped
    assert tokenizer.decode(answer[:3]) == "-\ufffd"  # 8 is not a number of tens yet


@pytest.mark.parametrize(
    "text", ["", "\n", "12", "12+34", "012+3=", "123+4=", "1*2=", "1+2=3", "+1=", "a"]
)
def test_prompt_that_is_not_a_problem_is_rejected_with_the_expected_form(text):
    expected = "two numbers of at most 2 digits and one of + -; try 12+34="
    said = f"{text!r}: is not a problem; expected {expected}"
    assert refusal(ArithmeticTokenizer("+-", 2).encode, text) == said


def test_example_problem_in_the_error_message_is_valid():
    for name, digits in ALL:
        tokenizer = ArithmeticTokenizer(TASKS[name], digits)
        tokenizer.encode(refusal(tokenizer.encode, "?").split("; try ")[1])


IMPOSSIBLE = [
    ({"block_size": 8}, "adder with digits=2; expected at least 9; try --block_size=9"),
    ({"dataset": "calculator"}, "block_size=9: too short for calculator with digits=2; expected"),
    ({"data_on_device": "always"}, "data_on_device='always'"),
]


@pytest.mark.parametrize(("keys", "message"), IMPOSSIBLE, ids=str)
def test_arithmetic_run_with_invalid_keys_is_rejected(tmp_path, keys, message):
    assert message in refusal(train, make_config(out_dir=f"{tmp_path}/run", max_iters=1, **keys))


def test_full_evaluation_of_endless_problems_is_rejected():
    problems = find_dataset(make_config(), 9).train
    batches = full_split(problems, make_mesh(make_config()), 4, 9)
    assert "; expected at least 1; try --eval_iters" in refusal(next, batches)


@pytest.mark.parametrize("name", ["adder", "calculator", "texts/adder.txt"])
def test_preparing_an_arithmetic_task_is_rejected(tmp_path, name):
    message = refusal(prepare, name, str(tmp_path))
    assert "the name of a task, which needs no preparation" in message
    assert not list(tmp_path.iterdir())


def test_accuracy_counts_correct_answers_and_lists_errors(monkeypatch):
    task = task_of("calculator", 2)
    kind, a, b = task.held_out
    rows = task.windows(task.held_out, task.longest)
    answers = iter(np.stack([np.resize(row[row >= 0], task.longest_answer) for row in rows]))

    def answer(_, task, problems):
        said = np.stack([next(answers) for _ in problems.a])
        wrong = (problems.kind == 1) & (problems.a == 90 + problems.a % 10)
        said[wrong, 0] = 0
        return said

    wrong = (kind == 1) & (a >= 90)
    monkeypatch.setattr(evaluation, "greedy_answers", answer)
    found = evaluation.accuracy(None, task)
    assert found["problems"] == len(a)
    assert found["exact"] == pytest.approx(1 - wrong.mean())
    two = (kind == 1) & (np.maximum(a, b) >= 10)
    assert found["exact - of 2 digits"] == f"{1 - wrong.sum() / two.sum():.2%} of {two.sum():,}"
    assert found["exact * of 1 digits"].startswith("100.00% of ")
    listed = {f"{a[n]}-{b[n]}" for n in np.flatnonzero(wrong)[: evaluation.ERRORS_SHOWN]}
    assert listed == {name for name in found if re.fullmatch(r"\d+\D\d+", name)}


@pytest.mark.slow
def test_trained_two_digit_adder_answers_every_held_out_sum(tmp_path, capsys):
    config = make_config(
        out_dir=str(tmp_path / "run"), n_layer=2, n_head=4, n_embd=64, bias=False, batch_size=128,
        gradient_accumulation_steps=1, steps_per_call=10, learning_rate=5e-3, min_lr=1e-5,
        warmup_iters=50, max_iters=1500, eval_interval=1500, eval_iters=2,
    )  # fmt: skip
    assert train(config) == 0
    found = evaluation.evaluate(config.out_dir, "latest")
    assert found["problems"] == 505
    assert found["exact"] == 1
    capsys.readouterr()
    cli.sample([f"--out_dir={config.out_dir}", "--start=95+7=", "--num_samples=2", "--device=cpu"])
    assert capsys.readouterr().out == 2 * f"95+7=102\n{cli.SEPARATOR}\n"
