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

from jaxgpt.api import load
from jaxgpt.cli import commands as cli
from jaxgpt.config import Config
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.batches import Batches
from jaxgpt.data.prepare import find_dataset, prepare
from jaxgpt.data.tasks import TASKS, Arithmetic, Problems, TrainProblems, ValProblems
from jaxgpt.data.text_stream import TextStream
from jaxgpt.data.tokenizer import ArithmeticTokenizer, CharTokenizer
from jaxgpt.evaluate import full_split
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.tools import evaluation
from jaxgpt.train import train

PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ALL = [("adder", 1), ("adder", 3), ("calculator", 1), ("calculator", 2), ("calculator", 9)]
FORMS = [
    {"working": on, "reverse_digits": units} for on in (False, True) for units in (True, False)
]
forms_of_tasks = pytest.mark.parametrize("forms", FORMS, ids=str)


def task_of(name: str, digits: int, **forms) -> Arithmetic:
    return Arithmetic(TASKS[name], digits, **forms)


def draw(task: Arithmetic, count: int) -> Problems:
    return task.draw(np.arange(count, dtype=np.uint64))


def spelled(task: Arithmetic, problems: Problems, length: int) -> list[tuple[str, str]]:
    """Return the problem and the targets of each window, as the characters that are trained on."""
    alphabet, pairs = task.tokenizer.chars, []
    for row in task.windows(problems, length):
        targets = np.flatnonzero(row >= 0)
        assert (np.diff(targets) == 1).all()
        assert {alphabet[~id] for id in row[targets[-1] + 1 :]} <= {"\n"}
        read = "".join(alphabet[id if id >= 0 else ~id] for id in row)
        pairs.append((read[: targets[0]], read[targets[0] : targets[-1] + 1]))
    return pairs


def answer_to(a: int, sign: str, b: int) -> str:
    """Return the answer to a problem in plain text."""
    if sign == "/":
        return "{}r{}".format(*divmod(a, b)) if b else "undefined"
    return str(PYTHON[sign](a, b))


def triples(problems: Problems) -> set[tuple[int, int, int]]:
    return set(zip(*(x.tolist() for x in problems), strict=True))


def make_config(**keys) -> Config:
    model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 9, "batch_size": 8}
    return Config(**{"dataset": "adder", "digits": 2, "mesh": "data:1"} | model | keys)


@pytest.mark.slow
@forms_of_tasks
@pytest.mark.parametrize(("name", "digits"), ALL)
def test_windows_hold_problems_and_answers(name, digits, forms):
    task = task_of(name, digits, **forms)
    for ask, said in spelled(task, draw(task, 3000), task.longest + 2):
        a, sign, b = re.fullmatch(r"(\d+)(\D)(\d+)=", ask).groups()
        assert len(a) == len(b) == digits
        answer = answer_to(int(a), sign, int(b))
        if forms["reverse_digits"]:
            answer = re.sub(r"\d+", lambda number: number[0][::-1], answer)
        working, _, written = said.rpartition("=")
        assert written == answer + "\n"
        assert bool(working) == (forms["working"] and answer != "undefined")


@pytest.mark.slow
@forms_of_tasks
@pytest.mark.parametrize(("name", "digits"), ALL)
def test_longest_problem_has_exactly_the_declared_length(name, digits, forms):
    task, top = task_of(name, digits, **forms), 10**digits - 1
    pairs = [(k, a, b) for k in range(len(task.operations)) for a in (0, top) for b in (0, 1, top)]
    extremes = Problems(*np.array(pairs).T)
    found = spelled(task, extremes, task.longest) + spelled(task, draw(task, 3000), task.longest)
    assert max(len(ask + said) for ask, said in found) == task.longest


# ---- the working, read by the rules that a pupil follows ---------------------------------------


def number(chain: str) -> int:
    """Return the number whose digits are written units first."""
    return int(chain[::-1])


def read_chain(chain: str, totals: list[int]) -> int:
    """Check digits and carries against the total at each digit; return the number they write."""
    carry = 0
    for digit, next_carry, total in zip(chain[::2], chain[1::2], totals, strict=True):
        assert 10 * int(next_carry) + int(digit) == total + carry
        carry = int(next_carry)
    return number(chain[::2]) + carry * 10 ** len(totals)


def check_addition(rows: list[str], a: str, b: str) -> None:
    (row,) = rows
    totals = [int(x) + int(y) for x, y in zip(a[::-1], b[::-1], strict=True)]
    assert read_chain(row, totals) == int(a) + int(b)


def read_borrows(chain: str, totals: list[int]) -> int:
    """Check digits and borrows against the total at each digit; return the number they write."""
    borrow = 0
    for digit, next_borrow, total in zip(chain[::2], chain[1::2], totals, strict=True):
        assert int(digit) - 10 * int(next_borrow) == total - borrow
        borrow = int(next_borrow)
    return number(chain[::2]) - borrow * 10 ** len(totals)


def check_subtraction(rows: list[str], a: str, b: str) -> None:
    difference, distance = rows
    totals = [int(x) - int(y) for x, y in zip(a[::-1], b[::-1], strict=True)]
    assert read_borrows(difference, totals) == int(a) - int(b)
    is_negative = difference[-1] == "1"
    totals = [-int(digit) if is_negative else int(digit) for digit in difference[::2]]
    read_borrows(distance, totals)
    assert number(distance[::2]) == abs(int(a) - int(b))


def check_multiplication(rows: list[str], a: str, b: str) -> None:
    so_far = 0
    for place, factor in enumerate(map(int, b[::-1])):
        product = read_chain(rows.pop(0), [int(digit) * factor for digit in a[::-1]])
        assert product == int(a) * factor
        before = so_far // 10
        so_far = product
        if place:
            digits = [f"{term:0{len(a) + 1}}"[::-1] for term in (before, product)]
            totals = [int(x) + int(y) for x, y in zip(*digits, strict=True)]
            so_far = read_chain(rows.pop(0), totals)
        assert so_far == int(a) * int(b[len(b) - 1 - place :]) // 10**place
    assert not rows


def check_division(rows: list[str], a: str, b: str) -> None:
    multiples, *rows = rows
    size = min(len(a), 2)
    parts = re.findall(rf"\d{{{size + 1}}}", multiples)
    assert [number(part) for part in parts] == [2 * int(b), 4 * int(b), 8 * int(b)]
    rest, quotient = 0, 0
    for digit, row in zip(a, rows, strict=True):
        rest = 10 * rest + int(digit)
        steps = re.findall(r"([<~>]+)(\d+)", row[:-1])
        for times, (signs, left) in zip((8, 4, 2, 1), steps, strict=True):
            pairs = zip(f"{rest:0{size + 1}}", f"{times * int(b):0{size + 1}}", strict=True)
            assert signs == "".join("<" if x < y else ">" if x > y else "~" for x, y in pairs)
            rest -= times * int(b) if "<" not in signs.lstrip("~")[:1] else 0
            assert number(left) == rest
        quotient = 10 * quotient + int(row[-1])
    assert (quotient, rest) == divmod(int(a), int(b))


CHECKS = {
    "+": check_addition,
    "-": check_subtraction,
    "*": check_multiplication,
    "/": check_division,
}


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_working_is_right_in_every_digit_and_carry(digits):
    task = task_of("calculator", digits, working=True)
    for ask, said in spelled(task, draw(task, 2000), task.longest):
        a, sign, b = re.fullmatch(r"(\d+)(\D)(\d+)=", ask).groups()
        if said != "undefined\n":
            CHECKS[sign](said.rpartition("=")[0].split(";"), a, b)


def test_plain_order_reverses_each_number_of_the_working():
    problems = Problems(*np.array([[1, 2, 3], [12, 37, 99], [34, 48, 5]]))
    tasks = [
        task_of("calculator", 2, working=True, reverse_digits=order) for order in (True, False)
    ]
    assert tasks[0].solutions(problems) == [
        "8171;2121=-22\n",
        "6592;8241;717010=6771\n",
        "010020040;~<>900~<>900~<>900~~>401;~~>900~<>900~<>900~~>409=91r4\n",
    ]
    assert tasks[1].solutions(problems) == [
        "1718;1212=-22\n",
        "2956;1428;010717=1776\n",
        "010020040;~<>009~<>009~<>009~~>041;~~>009~<>009~<>009~~>049=19r4\n",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "digits"), ALL)
def test_drawn_operations_and_number_lengths_have_expected_frequencies(name, digits):
    task = task_of(name, digits, working=True)
    kind, a, b = draw(task, 20_000)
    tokens = [len(ask + said) for ask, said in spelled(task, Problems(kind, a, b), task.longest)]
    longest = np.array([max(np.array(tokens)[kind == k]) for k in range(len(task.operations))])
    np.testing.assert_allclose(np.bincount(kind) / len(kind), longest / longest.sum(), atol=0.03)
    a, b = a[kind != 3], b[kind != 3]  # divisors have at most two digits
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
        assert drawn == every - held - mirrored


@pytest.mark.parametrize("name", ["adder", "calculator"])
def test_train_digits_limit_the_drawn_numbers_and_no_others(name):
    whole, short = task_of(name, 3), task_of(name, 3, train_digits=2)
    _, a, b = draw(short, 20_000)
    assert max(a.max(), b.max()) == 99
    assert not triples(draw(short, 20_000)) & triples(whole.held_out)
    assert short.tokenizer.to_json() == whole.tokenizer.to_json()
    np.testing.assert_array_equal(short.held_out, whole.held_out)
    for same in task_of(name, 3, train_digits=0), task_of(name, 3, train_digits=3):
        np.testing.assert_array_equal(draw(same, 1000), draw(whole, 1000))


@pytest.mark.slow
@forms_of_tasks
@pytest.mark.parametrize(("name", "digits"), [("adder", 3), ("calculator", 3), ("calculator", 4)])
def test_moved_problem_is_one_of_fewer_places_after_masked_line_breaks(name, digits, forms):
    task = task_of(name, digits, train_digits=2, **forms)
    split, alphabet = TrainProblems(task, random_offset=True), np.array(list(task.tokenizer.chars))
    starts = split.starts(np.arange(3000), block_size=9, seed=1, stream=0)
    problems, rows = task.draw(starts.view(np.uint64)), split.windows(starts, task.longest)
    is_unused = rows[:, :digits] == ~task.tokenizer.chars.index("\n")
    offsets = is_unused.sum(1)
    assert not offsets[problems.kind >= 2].any()  # products and quotients
    longer = np.char.str_len(np.maximum(problems.a, problems.b).astype(str))
    for length in (1, 2):
        moves = offsets[(longer == length) & (problems.kind < 2)]
        shares = np.bincount(moves) / len(moves)
        np.testing.assert_allclose(shares, 1 / (digits - length + 1), atol=0.08)
    for offset in range(digits):
        chosen, small = offsets == offset, task_of(name, digits - offset, **forms)
        assert is_unused[chosen, digits - offset : digits].all()  # the lowest places
        unmoved = spelled(small, Problems(*(x[chosen] for x in problems)), small.longest)
        for row, (ask, said) in zip(rows[chosen], unmoved, strict=True):
            assert "".join(alphabet[~row[row < 0]]).replace("\n", "") == ask
            assert "".join(alphabet[row[row >= 0]]) == said


COUNTS = [
    ("adder", 1, {1: 5}),
    ("adder", 3, {1: 5, 2: 500, 3: 10_000}),
    ("calculator", 3, {1: 5, 2: 500, 3: 10_000}),
]


@pytest.mark.parametrize(("name", "digits", "counts"), COUNTS)
def test_every_operation_and_length_has_held_out_problems(name, digits, counts):
    task = task_of(name, digits)
    kind, a, b = task.held_out
    assert len(triples(task.held_out)) == len(kind)
    assert b[kind == 3].max(initial=0) < 100
    for n, count in counts.items():
        for operation, sign in enumerate(task.operations):
            count = min(count, 5000) if sign == "/" else count
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


RECORDED = [
    ("adder", 3, "068+023= 047+006= 371+497= 082+041=", "299+165= 705+386= 086+479= 867+930="),
    ("calculator", 2, "68-23= 47+06= 71-97= 02*01=", "87+15= 07/84= 13*49= 96-88="),
]


@pytest.mark.parametrize(("name", "digits", "drawn", "held"), RECORDED)
def test_drawn_and_held_out_problems_match_recorded_values(name, digits, drawn, held):
    """Otherwise a run resumed on another machine would train on other, even held-out, problems."""
    task = task_of(name, digits)
    keys = TrainProblems(task).starts(np.arange(4), block_size=9, seed=1, stream=0)
    problems = task.draw(keys.view(np.uint64))
    assert " ".join(ask for ask, _ in spelled(task, problems, task.longest)) == drawn
    assert " ".join(ask for ask, _ in spelled(task, task.held_out, task.longest)[:4]) == held


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


WORKINGS = [("37*48=", "6592;8241;717010=6771", "1776"), ("1/0=", "undefined", "undefined")]


@pytest.mark.parametrize(("prompt", "solution", "answer"), WORKINGS)
def test_working_is_shown_only_on_demand(tmp_path, prompt, solution, answer):
    (tmp_path / "t.json").write_text(ArithmeticTokenizer("+-*/", 2, working=True).to_json())
    hidden = tokenizers.load(tmp_path / "t.json")
    shown = tokenizers.with_working(hidden)
    ids = [hidden.chars.index(char) for char in solution + "\n"]
    problem = hidden.encode(prompt).tolist()
    working = solution.rpartition("=")[0] + "=" if "=" in solution else ""
    for tokenizer, text in (hidden, answer), (shown, working + answer):
        assert tokenizer.decode(problem + ids) == prompt + text + "\n"
        stream, pieces = TextStream(tokenizer, tokenizer.stop), []
        for n in range(1, len(ids) + 1):
            pieces.append(stream.push(ids[:n]))
        assert "".join(pieces) == text
        assert stream.stopped
    assert hidden.decode(problem + ids[:3]) == prompt + "\ufffd"
    assert tokenizers.same_ids(hidden, shown)


@pytest.mark.parametrize("tokenizer", [ArithmeticTokenizer("+-*/", 2), CharTokenizer("ab")])
def test_working_of_a_model_that_writes_none_is_refused(tokenizer):
    said = refusal(tokenizers.with_working, tokenizer)
    assert "show_working=True: the model writes no working; expected a run of" in said


def test_tokenizer_of_a_calculator_without_remainders_is_refused(tmp_path):
    (tmp_path / "t.json").write_text('{"type": "arithmetic", "operations": "+-*/", "digits": 2}')
    assert "t.json: not a tokenizer" in refusal(tokenizers.load, tmp_path / "t.json")
    (tmp_path / "t.json").write_text('{"type": "arithmetic", "operations": "+", "digits": 2}')
    assert tokenizers.load(tmp_path / "t.json").decode([1]) == "+"


def test_divisors_have_at_most_two_digits():
    tokenizer = ArithmeticTokenizer("+-*/", 3)
    assert len(tokenizer.encode("999/99=")) == len(tokenizer.encode("1*123=")) == 8
    said = refusal(tokenizer.encode, "999/100=")
    parts = "two numbers of at most 3 digits (a divisor of at most 2) and one of + - * /"
    assert said == f"'999/100=': is not a problem; expected {parts}; try 12+34="


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
    ({"train_digits": 3}, "digits of any problem; expected at most 2; try --train_digits=2"),
    ({"random_offset": True}, "reach all places of digits=2; expected train_digits below digits"),
    ({"random_offset": True, "train_digits": 2}, "random_offset=True: training problems already"),
    ({"data_on_device": "always"}, "data_on_device='always'"),
    ({"eval_iters": 0}, "eval_iters=0: needs a split that ends, but training problems are endless"),
]


@pytest.mark.parametrize(("keys", "message"), IMPOSSIBLE, ids=str)
def test_arithmetic_run_with_invalid_keys_is_rejected(tmp_path, keys, message):
    assert message in refusal(train, make_config(out_dir=f"{tmp_path}/run", max_iters=1, **keys))
    assert not (tmp_path / "run" / "config.json").exists()  # an old run there is still whole


def test_full_evaluation_of_endless_problems_is_rejected():
    problems = find_dataset(make_config(), 9).train
    batches = full_split(problems, make_mesh(make_config()), 4, 9)
    assert "; expected at least 1; try --eval_iters" in refusal(next, batches)


@pytest.mark.parametrize("name", ["adder", "calculator", "texts/adder.txt"])
def test_preparing_an_arithmetic_task_is_rejected(tmp_path, name):
    message = refusal(prepare, name, str(tmp_path))
    assert "the name of a task, which needs no preparation" in message
    assert not list(tmp_path.iterdir())


def next_digit(text: str) -> str:
    """Return the text with another first digit."""
    return re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), text, count=1)


def test_accuracy_counts_answers_and_names_errors(monkeypatch):
    task = task_of("calculator", 2, working=True)
    kind, a, b = task.held_out
    right = [text.rpartition("=") for text in task.solutions(task.held_out)]
    said = ["".join(parts) for parts in right]
    mistakes = {
        "right working and wrong answer": (kind == 1) & (a >= 90) & (b < 50),
        "wrong working": (kind == 2) & (a >= 80) & (b >= 10),
        "no end": (kind == 0) & (a < 5),
    }
    harmless = (kind == 2) & (a < 10) & (b >= 10)  # an error of the working, but not of the answer
    for n, (working, mark, answer) in enumerate(right):
        if mistakes["right working and wrong answer"][n]:
            said[n] = working + mark + next_digit(answer)
        elif mistakes["wrong working"][n]:
            said[n] = next_digit(working) + mark + next_digit(answer)
        elif mistakes["no end"][n]:
            said[n] = working + mark + answer.strip()
        elif harmless[n]:
            said[n] = next_digit(working) + mark + answer
    monkeypatch.setattr(evaluation, "greedy_solutions", lambda *_: said)
    found = evaluation.accuracy(None, task)
    wrong = np.any(list(mistakes.values()), axis=0)
    assert harmless.any()
    assert found["problems"] == len(kind)
    assert found["exact"] == pytest.approx(1 - wrong.mean())
    assert {f"errors, {name}": chosen.sum() for name, chosen in mistakes.items()} == {
        name: count for name, count in found.items() if name.startswith("errors")
    }
    two, count = (kind == 1) & (np.maximum(a, b) >= 10), (wrong & (kind == 1)).sum()
    beginning = f"{1 - count / two.sum():.2%} of {two.sum():,}, {count} wrong (95% interval "
    assert found["exact - of 2 digits"].startswith(beginning)
    assert found["exact /"].startswith(f"100.00% of {(kind == 3).sum():,}, 0 wrong (")
    shown = np.flatnonzero(wrong)[: evaluation.ERRORS_SHOWN]
    names = [f"{a[n]}{task.operations[kind[n]]}{b[n]}" for n in shown]
    assert names == [name for name in found if re.fullmatch(r"\d+\D\d+", name)]
    for n, name in zip(shown, names, strict=True):
        expected = answer_to(a[n], task.operations[kind[n]], b[n])
        answer, right_answer = found[name].split(", but expected ")
        assert right_answer == expected
        assert (answer == expected) == (said[n][-1] != "\n")


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(1, 2, 0.0945, 0.9055), (95, 100, 0.8882, 0.9785), (10, 10, 0.7225, 1)],
)
def test_interval_of_a_proportion_matches_published_values(right, n, low, high):
    text = evaluation.proportion(np.arange(n) < right)
    found = [float(number) / 100 for number in re.findall(r"([\d.]+)% to ([\d.]+)%", text)[0]]
    assert found == pytest.approx([low, high], abs=1e-4)


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


@pytest.mark.slow
def test_one_digit_calculator_learns_every_problem_and_its_working(tmp_path, capsys):
    """Held-out problems would be holes in its tables of one digit; longer numbers fill them."""
    config = make_config(
        out_dir=str(tmp_path / "run"), dataset="calculator", digits=1, working=True, block_size=40,
        n_layer=2, n_head=3, n_embd=48, bias=False, batch_size=64, gradient_accumulation_steps=1,
        steps_per_call=10, optimizer="muon", learning_rate=1e-2, min_lr=1e-5, warmup_iters=50,
        max_iters=600, eval_interval=600, eval_iters=1,
    )  # fmt: skip
    assert train(config) == 0
    run = load(config.out_dir, checkpoint="latest")
    task = task_of("calculator", 1, working=True)
    every = triples(task.draw(np.arange(20_000, dtype=np.uint64)))
    task.held_out = Problems(*np.array(sorted(every)).T)
    assert evaluation.greedy_solutions(run.sampler, task) == task.solutions(task.held_out)
    capsys.readouterr()
    flags = [f"--out_dir={config.out_dir}", "--start=7*8=", "--num_samples=1", "--temperature=0"]
    cli.sample([*flags, "--device=cpu"])
    cli.sample([*flags, "--device=cpu", "--show_working"])
    assert capsys.readouterr().out == f"7*8=56\n{cli.SEPARATOR}\n7*8=65=56\n{cli.SEPARATOR}\n"
