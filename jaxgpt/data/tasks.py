"""Generate problems of arithmetic on the fly: "123+456=" and its answer, units first.

The digits of an answer are reversed, because carries start at the units. The numbers of a problem
have leading zeros. The tokenizer undoes both in text. n is the number of problems.
"""

import sys
from typing import NamedTuple

import numpy as np

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data.order import permute, splitmix64
from jaxgpt.data.tokenizer import ArithmeticTokenizer
from jaxgpt.data.tokens import Dataset, TokenSplit

TASKS = {"adder": "+", "calculator": "+-*/"}
ONE_IN = 20  # of the pairs of one operation and length, one in this many is held out
MAX_HELD_OUT = 10_000  # per operation and length


class Problems(NamedTuple):
    """Problems with natural numbers `a` and `b`; `kind` indexes "+-*/". All are int64 [n]."""

    kind: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def answers(self) -> np.ndarray:
        """Compute the answers, int64 [n]. A quotient is rounded down."""
        kind, a, b = self
        return np.choose(kind, [a + b, a - b, a * b, a // np.maximum(b, 1)])


class Arithmetic:
    """The problems of some operations with numbers of 1 to `digits` digits.

    For every length n, a fixed rule holds out some pairs below 10^n: the first ones in the order
    of `permute`. Neither a held-out pair nor its mirror image is ever drawn.
    """

    def __init__(self, operations: str, digits: int):
        self.operations, self.digits = operations, digits
        self.tokenizer = ArithmeticTokenizer(operations, digits)
        self.longest_answer = (2 * digits if "*" in operations else digits + 1) + 1  # line break
        self.longest = 2 * digits + 2 + self.longest_answer
        parts = []
        for n in range(1, digits + 1):
            num_pairs = 10 ** (2 * n)
            first = np.arange(min(MAX_HELD_OUT, num_pairs // ONE_IN))
            for kind in range(len(operations)):
                key = np.full(len(first), 100 * n + kind, np.uint64)
                a, b = np.divmod(permute(first, num_pairs, key).astype(np.int64), 10**n)
                parts.append(np.stack([np.full(len(first), kind), a, b]))
        problems = _problems(*np.concatenate(parts, axis=1))
        triples = np.unique(np.stack(problems), axis=1)
        hashes = splitmix64(self._ids(Problems(*triples)).astype(np.uint64))
        self.held_out = Problems(*triples[:, np.argsort(hashes, kind="stable")])
        self._held_ids = np.unique(self._ids(self.held_out))

    def _ids(self, problems: Problems) -> np.ndarray:
        """Number the problems, below 2^63. A problem and its mirror image share a number."""
        kind, a, b = problems
        top = 10**self.digits
        return (kind * top + np.maximum(a, b)) * top + np.minimum(a, b)

    def draw(self, keys: np.ndarray) -> Problems:
        """Draw a problem from each key, [n]. A key whose problem is held out is hashed again.

        The length is the longer of two uniform draws, because long numbers are harder to learn.
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
        random = []
        for _ in range(5):
            keys = splitmix64(keys)
            random.append(keys)
        digits, operations = np.uint64(self.digits), np.uint64(len(self.operations))
        length = np.maximum(random[0] % digits, random[1] % digits) + np.uint64(1)
        top = np.uint64(10) ** length
        drawn = random[2] % operations, random[3] % top, random[4] % top
        return _problems(*(x.astype(np.int64) for x in drawn))

    def windows(self, problems: Problems, length: int) -> np.ndarray:
        """Write one problem per row, int32 [n, `length`]; targets are the answer and its end."""
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
    """Make problems with divisors of at least 1."""
    return Problems(kind, a, np.where(kind == 3, np.maximum(b, 1), b))


class TrainProblems(TokenSplit):
    """A split of endless training problems; a window's start is the key of its problem."""

    def __init__(self, task: Arithmetic):
        self.task = task
        self.dtype = np.dtype(np.int32)

    def __len__(self) -> int:
        return sys.maxsize

    def starts(self, sample_ids: np.ndarray, *, seed: int, stream: int, **_: int) -> np.ndarray:
        seeds = splitmix64(np.full(len(sample_ids), seed, np.uint64))
        keys = splitmix64(seeds + np.uint64(stream)) + sample_ids.astype(np.uint64)
        return splitmix64(keys).view(np.int64)

    def read(self, start: int, length: int) -> np.ndarray:
        problem = "needs a split that ends, but training problems are endless"
        raise UserError(f"eval_iters=0: {problem}; expected at least 1; try --eval_iters=200")

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.task.windows(self.task.draw(starts.view(np.uint64)), length)


class ValProblems(TokenSplit):
    """A split of the held-out problems, one per `block_size` tokens in a fixed order."""

    def __init__(self, task: Arithmetic, block_size: int):
        self.task = task
        self.dtype = np.dtype(np.int32)
        self.block_size = block_size
        self.rows = task.windows(task.held_out, block_size + 1)

    def __len__(self) -> int:
        return len(self.rows) * self.block_size + 1

    def starts(self, sample_ids: np.ndarray, *, block_size: int, **_: int) -> np.ndarray:
        """Take one problem after the other, repeatedly; the fixed order is already shuffled."""
        return (sample_ids % np.uint64(len(self.rows))).astype(np.int64) * block_size

    def read(self, start: int, length: int) -> np.ndarray:
        return self.rows[start // self.block_size][:length]


def open_task(config: DataConfig, block_size: int) -> Dataset:
    """Make the dataset of a task. Raises `UserError` if `block_size` is too small."""
    operations, digits = TASKS[config.dataset], config.digits
    task = Arithmetic(operations, digits)
    least = task.longest - 1
    if block_size < least:
        problem = f"too short for {config.dataset} with digits={digits}"
        advice = f"expected at least {least}; try --block_size={least}"
        raise UserError(f"block_size={block_size}: {problem}; {advice}")
    train, val = TrainProblems(task), ValProblems(task, block_size)
    vocab_size = task.tokenizer.vocab_size
    source = f"{operations} of numbers up to {digits} digits, {len(val.rows):,} held out"
    fingerprint = {"operations": operations, "digits": digits}
    example = "7" * digits + operations[0] + "5" * digits + "="
    return Dataset(train, val, vocab_size, task.tokenizer, source, fingerprint, example)
