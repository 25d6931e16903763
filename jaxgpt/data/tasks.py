"""Problems of arithmetic, made as they are needed: "123+456=" and its answer, units first.

The digits of an answer are reversed, because carries start at the units, and the numbers of a
problem have leading zeros. The tokenizer undoes both in text. n problems, T length.
"""

import sys
from typing import NamedTuple

import numpy as np

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data.order import permute, splitmix64
from jaxgpt.data.tokenizer import ArithmeticTokenizer
from jaxgpt.data.tokens import Dataset, TokenSplit

TASKS = {"adder": "+", "calculator": "+-*/"}
# Held out of an operation's pairs of one length: one in ONE_IN, and at most MAX_HELD_OUT.
MAX_HELD_OUT, ONE_IN = 10_000, 20


class Problems(NamedTuple):
    """`a` and `b` are natural numbers, int64 [n]; `kind` is the operation's index in "+-*/"."""

    kind: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def answers(self) -> np.ndarray:
        """Computes the answers, int64 [n]. A quotient is rounded down."""
        kind, a, b = self
        return np.choose(kind, [a + b, a - b, a * b, a // np.maximum(b, 1)])


class Arithmetic:
    """The problems of some operations with numbers of 1 to `digits` digits.

    For every length n, some pairs below 10^n are held out by a fixed rule: the first ones in the
    order that `permute` gives the pairs. Neither such a pair nor its mirror image is ever drawn.
    """

    def __init__(self, operations: str, digits: int):
        self.operations, self.digits = operations, digits
        self.tokenizer = ArithmeticTokenizer(operations, digits)
        self.longest_answer = 1 + (2 * digits if "*" in operations else digits + 1)  # and its end
        self.longest = 2 * digits + 2 + self.longest_answer
        pairs = []
        for n in range(1, digits + 1):
            size = 10 ** (2 * n)
            first = np.arange(min(MAX_HELD_OUT, size // ONE_IN))
            for kind in range(len(operations)):
                key = np.full(len(first), 100 * n + kind, np.uint64)
                a, b = np.divmod(permute(first, size, key).astype(np.int64), 10**n)
                pairs.append((np.full(len(first), kind), a, b))
        problems = _problems(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))
        triples = np.unique(np.stack(problems), axis=1)
        hashes = splitmix64(self._ids(Problems(*triples)).astype(np.uint64))
        self.held_out = Problems(*triples[:, np.argsort(hashes, kind="stable")])
        self._held_ids = np.unique(self._ids(self.held_out))

    def _ids(self, problems: Problems) -> np.ndarray:
        """Numbers the problems, below 2^63. A problem and its mirror image share a number."""
        kind, a, b = problems
        top = 10**self.digits
        return (kind * top + np.maximum(a, b)) * top + np.minimum(a, b)

    def draw(self, keys: np.ndarray) -> Problems:
        """Draws a problem from each key. A key whose problem is held out is hashed again.

        The length is the longer of two even draws, because long numbers take more learning.
        """
        keys = keys.astype(np.uint64)
        while True:
            problems = self._draw(keys)
            ids = self._ids(problems)
            at = np.searchsorted(self._held_ids, ids) % len(self._held_ids)
            held_out = self._held_ids[at] == ids
            if not held_out.any():
                return problems
            keys = np.where(held_out, splitmix64(~keys), keys)

    def _draw(self, keys: np.ndarray) -> Problems:
        rng = [keys := splitmix64(keys) for _ in range(5)]
        digits, operations = np.uint64(self.digits), np.uint64(len(self.operations))
        top = np.uint64(10) ** (np.maximum(rng[0] % digits, rng[1] % digits) + np.uint64(1))
        drawn = rng[2] % operations, rng[3] % top, rng[4] % top
        return _problems(*(x.astype(np.int64) for x in drawn))

    def windows(self, problems: Problems, length: int) -> np.ndarray:
        """Writes a problem a row, int32 [n, `length`]: `~id`, but for the answer and its end."""
        kind, a, b = problems
        answers, d, start = problems.answers(), self.digits, 2 * self.digits + 2
        powers = 10 ** np.arange(self.longest_answer - 1)
        text = np.full((len(a), length), ord("\n"), np.uint8)
        for at, numbers in (0, a), (d + 1, b):
            text[:, at : at + d] = ord("0") + numbers[:, None] // powers[d - 1 :: -1] % 10
        text[:, d] = np.frombuffer(self.operations.encode(), np.uint8)[kind]
        text[:, start - 1] = ord("=")
        is_negative, size = (answers < 0)[:, None], np.abs(answers)[:, None]
        num_digits = np.maximum(1, (size >= powers).sum(1, keepdims=True))
        exponent = np.arange(len(powers)) - is_negative  # of an answer's digits; -1 is its sign
        answer = ord("0") + size // powers[np.maximum(exponent, 0)] % 10
        answer = np.where(exponent < 0, ord("-"), answer)
        text[:, start:][:, : len(powers)] = np.where(exponent < num_digits, answer, ord("\n"))
        column = np.arange(length)
        is_target = (column >= start) & (column <= start + is_negative + num_digits)
        alphabet = np.frombuffer(self.tokenizer.chars.encode(), np.uint8)
        ids = np.searchsorted(alphabet, text).astype(np.int32)
        return np.where(is_target, ids, ~ids)


def _problems(kind: np.ndarray, a: np.ndarray, b: np.ndarray) -> Problems:
    """Replaces a divisor of 0 by 1."""
    return Problems(kind, a, np.where(kind == 3, np.maximum(b, 1), b))


class TrainProblems(TokenSplit):
    """Endless problems to train on; a window's start is the key that it is drawn from."""

    def __init__(self, task: Arithmetic):
        self.task, self.dtype = task, np.dtype(np.int32)

    def __len__(self) -> int:
        return sys.maxsize

    def starts(self, sample_ids: np.ndarray, *, seed: int, stream: int, **_: int) -> np.ndarray:
        seeds = splitmix64(np.full(len(sample_ids), seed, np.uint64))
        keys = splitmix64(seeds + np.uint64(stream)) + sample_ids.astype(np.uint64)
        return splitmix64(keys).view(np.int64)

    def read(self, start: int, length: int) -> np.ndarray:
        raise UserError("eval_iters=0: must be at least 1, because the training problems never end")

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.task.windows(self.task.draw(starts.view(np.uint64)), length)


class ValProblems(TokenSplit):
    """The held-out problems as a split, one per `block_size` tokens in a fixed order."""

    def __init__(self, task: Arithmetic, block_size: int):
        self.task, self.dtype, self.block_size = task, np.dtype(np.int32), block_size
        self.rows = task.windows(task.held_out, block_size + 1)

    def __len__(self) -> int:
        return len(self.rows) * self.block_size + 1

    def starts(self, sample_ids: np.ndarray, *, block_size: int, **_: int) -> np.ndarray:
        """Takes one problem after the other, over and over; they are well mixed."""
        return (sample_ids % np.uint64(len(self.rows))).astype(np.int64) * block_size

    def read(self, start: int, length: int) -> np.ndarray:
        return self.rows[start // self.block_size][:length]


def open_task(config: DataConfig, block_size: int) -> Dataset:
    """Makes the dataset of a task. Raises `UserError` where `block_size` is too small."""
    operations, digits = TASKS[config.dataset], config.digits
    task = Arithmetic(operations, digits)
    if block_size < task.longest - 1:
        least = f"at least {task.longest - 1} for the {config.dataset} with digits={digits}"
        raise UserError(f"block_size={block_size}: must be {least}")
    val = ValProblems(task, block_size)
    train, vocab_size = TrainProblems(task), task.tokenizer.vocab_size
    source = f"{operations} of numbers up to {digits} digits, {len(val.rows):,} held out"
    fingerprint = {"operations": operations, "digits": digits}
    example = "7" * digits + operations[0] + "5" * digits + "="
    return Dataset(train, val, vocab_size, task.tokenizer, source, fingerprint, example)
