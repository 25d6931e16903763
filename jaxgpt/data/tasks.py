"""Problems of arithmetic, made as they are needed: "123+456=" and its answer, units first.

The digits of an answer are in reverse, since a carry goes from the units up, and the numbers of a
problem have leading zeros; the tokenizer sees to it that texts read as usual. n problems, T length.
"""

import sys
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data.order import permute, splitmix64
from jaxgpt.data.tokenizer import ArithmeticTokenizer
from jaxgpt.data.tokens import Dataset, TokenSplit

TASKS = {"adder": "+", "calculator": "+-*/"}
MOST_HELD_OUT, SHARE_HELD_OUT = 10_000, 20  # of an operation's pairs: so many, or one in so many


class Problems(NamedTuple):
    """`a` and `b` are natural numbers, int64 [n]; `kind` is the operation's place in +-*/."""

    kind: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def answers(self) -> np.ndarray:
        """int64 [n]. A quotient is a whole number, what remains is dropped."""
        kind, a, b = self
        return np.choose(kind, [a + b, a - b, a * b, a // np.maximum(b, 1)])


class Arithmetic:
    """The problems of some operations with numbers of 1 to `digits` digits.

    For every length n, a share of the pairs below 10^n is held out, by a fixed rule: of the pairs
    in the order that `permute` gives them, the first. Neither such a pair nor its mirror image is
    ever drawn, whatever the seed.
    """

    def __init__(self, operations: str, digits: int):
        self.operations, self.digits = operations, digits
        self.tokenizer = ArithmeticTokenizer(operations, digits)
        self.longest_answer = 1 + (2 * digits if "*" in operations else digits + 1)  # and its end
        self.longest = 2 * digits + 2 + self.longest_answer
        self.held_out = self._hold_out()
        self._held_names = np.unique(self._names(self.held_out))

    def _hold_out(self) -> Problems:
        """All that are held out, once each and well mixed."""
        pairs = []
        for n in range(1, self.digits + 1):
            size = 10 ** (2 * n)
            first = np.arange(min(MOST_HELD_OUT, size // SHARE_HELD_OUT))
            for kind in range(len(self.operations)):
                places = permute(first, size, np.full(len(first), 100 * n + kind, np.uint64))
                a, b = np.divmod(places.astype(np.int64), 10**n)
                pairs.append((np.full(len(first), kind), a, b))
        kind, a, b = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        problems = Problems(kind, a, _divisors(kind, b))
        triples = np.unique(np.stack(problems), axis=1)
        order = np.argsort(
            splitmix64(self._names(Problems(*triples)).astype(np.uint64)), kind="stable"
        )
        return Problems(*triples[:, order])

    def _names(self, problems: Problems) -> np.ndarray:
        """A number for each problem, the same one for its mirror image; below 2^63."""
        kind, a, b = problems
        top = 10**self.digits
        return (kind * top + np.maximum(a, b)) * top + np.minimum(a, b)

    def _is_held_out(self, problems: Problems) -> np.ndarray:
        names = self._names(problems)
        at = np.searchsorted(self._held_names, names) % len(self._held_names)
        return self._held_names[at] == names

    def draw(self, keys: np.ndarray) -> Problems:
        """A problem for each key, none of them held out: a pure function of the key.

        Their length is the longer of two even draws, as long numbers take more learning; the
        numbers of a length may be shorter, too.
        """
        keys = keys.astype(np.uint64)
        problems = self._draw(keys)
        while (held := self._is_held_out(problems)).any():
            keys = np.where(held, splitmix64(~keys), keys)
            problems = self._draw(keys)
        return problems

    def _draw(self, keys: np.ndarray) -> Problems:
        dice = [keys := splitmix64(keys) for _ in range(5)]
        length = np.maximum(*(die % np.uint64(self.digits) for die in dice[:2])) + np.uint64(1)
        top = np.uint64(10) ** length
        kind = dice[2] % np.uint64(len(self.operations))
        kind, a, b = (x.astype(np.int64) for x in (kind, dice[3] % top, dice[4] % top))
        return Problems(kind, a, _divisors(kind, b))

    def windows(self, problems: Problems, length: int) -> np.ndarray:
        """One problem a row, int32 [n, `length`]: ids of the answer and the line break after it,
        and `~id`, which is not to be predicted, of all else; the rest of a row is line breaks.
        """
        kind, a, b = problems
        answers = problems.answers()
        text = np.full((len(a), length), ord("\n"), np.uint8)
        at = _write(text, np.zeros(len(a), int), a, width=self.digits)
        at = _write_signs(text, at, np.frombuffer(self.operations.encode(), np.uint8)[kind])
        at = _write(text, at, b, width=self.digits)
        at = _write_signs(text, at, np.full(len(a), ord("="), np.uint8))
        signs = np.where(answers < 0, ord("-"), 0).astype(np.uint8)
        end = _write(text, _write_signs(text, at, signs), np.abs(answers), units_first=True)
        column = np.arange(length)
        is_target = (column >= at[:, None]) & (column <= end[:, None])
        alphabet = np.frombuffer(self.tokenizer.chars.encode(), np.uint8)
        ids = np.searchsorted(alphabet, text).astype(np.int32)
        return np.where(is_target, ids, ~ids)


def _divisors(kind: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`b`, but 1 in place of 0 where it divides."""
    return np.where(kind == 3, np.maximum(b, 1), b)


def _write(
    text: np.ndarray, at: np.ndarray, numbers: np.ndarray, *, width: int = 1, units_first=False
) -> np.ndarray:
    """Writes a number into each row of `text` from column `at` on -> the columns after them.

    Numbers have at least `width` digits, by zeros in front.
    """
    powers = 10 ** np.arange(max(width, len(str(numbers.max(initial=0)))))
    digits = numbers[:, None] // powers % 10
    lengths = np.maximum(width, 1 + (numbers[:, None] >= powers[1:]).sum(1))
    place = np.arange(len(powers))
    columns = at[:, None] + (place if units_first else lengths[:, None] - 1 - place)
    row, digit = np.nonzero(place < lengths[:, None])
    text[row, columns[row, digit]] = ord("0") + digits[row, digit]
    return at + lengths


def _write_signs(text: np.ndarray, at: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Writes a sign into each row that has one, not 0 -> the columns after them."""
    (row,) = np.nonzero(signs)
    text[row, at[row]] = signs[row]
    return at + (signs > 0)


class TrainProblems(TokenSplit):
    """Problems to train on, without end: a window's place is the key it is drawn from."""

    def __init__(self, task: Arithmetic):
        self.task, self.dtype = task, np.dtype(np.int32)

    def __len__(self) -> int:
        return sys.maxsize

    def starts(self, samples: np.ndarray, *, block_size: int, seed: int, stream: int) -> np.ndarray:
        seeds = splitmix64(splitmix64(np.full(len(samples), seed, np.uint64)) + np.uint64(stream))
        return splitmix64(seeds + samples.astype(np.uint64)).view(np.int64)

    def read(self, start: int, length: int) -> np.ndarray:
        raise UserError("eval_iters=0: must be at least 1, as the problems to train on never end")

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.task.windows(self.task.draw(starts.view(np.uint64)), length)


class ValProblems(TokenSplit):
    """The problems that are held out, as a split: one each `block_size` tokens, in fixed order."""

    def __init__(self, task: Arithmetic, block_size: int):
        self.task, self.dtype, self.block_size = task, np.dtype(np.int32), block_size
        self.rows = task.windows(task.held_out, block_size + 1)

    def __len__(self) -> int:
        return len(self.rows) * self.block_size + 1

    def starts(self, samples: np.ndarray, *, block_size: int, seed: int, stream: int) -> np.ndarray:
        """One problem after the other, round and round: they are well mixed."""
        return (samples % np.uint64(len(self.rows))).astype(np.int64) * block_size

    def read(self, start: int, length: int) -> np.ndarray:
        return self.rows[start // self.block_size][:length]


def open_task(config: DataConfig, block_size: int) -> Dataset:
    """The dataset of a task. Raises `UserError` where `block_size` is too small for it."""
    operations, digits = TASKS[config.dataset], config.digits
    task = Arithmetic(operations, digits)
    if block_size < task.longest - 1:
        raise UserError(
            f"block_size={block_size}: must be at least {task.longest - 1} for the "
            f"{config.dataset} with digits={digits}"
        )
    held_out = ValProblems(task, block_size)
    fingerprint: dict[str, Any] = {"operations": operations, "digits": digits}
    return Dataset(
        train=TrainProblems(task),
        val=held_out,
        vocab_size=task.tokenizer.vocab_size,
        tokenizer=task.tokenizer,
        source=f"{operations} of numbers up to {digits} digits, {len(held_out.rows):,} held out",
        fingerprint=fingerprint,
        example="7" * digits + operations[0] + "5" * digits + "=",
    )
