"""Generate problems of arithmetic on the fly: "123+456=", its working if wanted, and its answer.

With `reverse_digits` the units of an answer come first, because carries start there. The numbers
of a problem have leading zeros. The tokenizer undoes both in text. n is the number of problems.
"""

import sys
from typing import NamedTuple

import numpy as np

from jaxgpt.config import DataConfig, UserError
from jaxgpt.data.order import permute, splitmix64
from jaxgpt.data.tokenizer import REMAINDER, UNDEFINED, ArithmeticTokenizer
from jaxgpt.data.tokens import Dataset, TokenSplit
from jaxgpt.data.working import OPERATIONS, Chain, characters, digits_of, divisor_digits

TASKS = {"adder": "+", "calculator": "+-*/"}
ONE_IN = 20  # of the pairs of one operation and length, one in this many is held out
MAX_HELD_OUT = 10_000  # per operation and length
BLANK = 0  # in place of a character that a problem leaves out
UNUSED = 1  # in place of a digit below the units of a problem that is moved up


class Problems(NamedTuple):
    """Problems with natural numbers `a` and `b`; `kind` indexes "+-*/". All are int64 [n]."""

    kind: np.ndarray
    a: np.ndarray
    b: np.ndarray


class Arithmetic:
    """The problems of some operations with numbers of 1 to `digits` digits, divisors of 1 or 2.

    For every length n, a fixed rule holds out some pairs below 10^n: the first ones in the order
    of `permute`. Neither a held-out pair nor its mirror image is ever drawn. Drawn numbers have at
    most `train_digits` digits.
    """

    def __init__(self, operations: str, digits: int, *, train_digits: int = 0, **forms: bool):
        self.operations, self.digits = operations, digits
        self.train_digits = train_digits or digits
        self.tokenizer = ArithmeticTokenizer(operations, digits, **forms)
        self.forms = self.tokenizer.forms  # `working` and `reverse_digits` of the config
        top = 10**digits - 1
        a, b = (x.ravel() for x in np.meshgrid([0, top], [0, 1, top]))  # of the longest answers
        sizes = [self._text(sign, a, b)[1].max() + 1 for sign in operations]  # with a line break
        self.longest = int(max(sizes))
        self._drawn_until = np.cumsum(sizes).astype(np.uint64)  # longer problems are drawn more
        self.held_out = self._hold_out()
        self._held_ids = np.unique(self._ids(self.held_out))

    def _hold_out(self) -> Problems:
        """Choose the held-out problems of every operation and length, and shuffle them."""
        parts = []
        for n in range(1, self.digits + 1):
            for kind, sign in enumerate(self.operations):
                top = 10 ** (divisor_digits(n) if sign == "/" else n)  # of the second number
                num_pairs = 10**n * top
                first = np.arange(min(MAX_HELD_OUT, num_pairs // ONE_IN))
                key = np.full(len(first), 100 * n + kind, np.uint64)
                a, b = np.divmod(permute(first, num_pairs, key).astype(np.int64), top)
                parts.append(np.stack([np.full(len(first), kind), a, b]))
        triples = np.unique(np.concatenate(parts, axis=1), axis=1)
        hashes = splitmix64(self._ids(Problems(*triples)).astype(np.uint64))
        return Problems(*triples[:, np.argsort(hashes, kind="stable")])

    def _ids(self, problems: Problems) -> np.ndarray:
        """Number the problems, below 2^63. A problem and its mirror image share a number."""
        kind, a, b = problems
        top = 10**self.digits
        return (kind * top + np.maximum(a, b)) * top + np.minimum(a, b)

    def draw(self, keys: np.ndarray) -> Problems:
        """Draw a problem from each key, [n]. A key whose problem is held out is hashed again.

        The length is the longer of two uniform draws, because long numbers are harder to learn.
        An operation's share is proportional to the length of its text.
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
        digits = np.uint64(self.train_digits)
        length = np.maximum(random[0] % digits, random[1] % digits) + np.uint64(1)
        place = random[2] % self._drawn_until[-1]
        kind = np.searchsorted(self._drawn_until, place, side="right")
        is_division = np.array([sign == "/" for sign in self.operations])[kind]
        size = np.where(is_division, np.minimum(length, divisor_digits(self.digits)), length)
        a, b = random[3] % np.uint64(10) ** length, random[4] % np.uint64(10) ** size
        return Problems(kind, a.astype(np.int64), b.astype(np.int64))

    def draw_offsets(self, problems: Problems, keys: np.ndarray) -> np.ndarray:
        """Draw by how many places each sum or difference is moved up, int64 [n].

        So digits also stand at the places that only longer numbers reach otherwise (the offsets
        of McLeish et al. 2024). Products and quotients are not moved.
        """
        longer = np.maximum(problems.a, problems.b)
        choices = sum((longer < 10**n).astype(np.uint64) for n in range(1, self.digits + 1))
        offsets = (splitmix64(splitmix64(~keys)) % choices).astype(np.int64)
        is_moved = np.array([sign in "+-" for sign in self.operations])
        return np.where(is_moved[problems.kind], offsets, 0)

    def windows(self, problems: Problems, length: int, offsets: np.ndarray | int = 0) -> np.ndarray:
        """Write one problem per row, int32 [n, `length`], moved up by `offsets` places, [n].

        Targets are the working, the answer and the line break after it.
        """
        offsets = np.broadcast_to(offsets, len(problems.kind))
        text = np.full((len(problems.kind), length), ord("\n"), np.uint8)
        ends = np.empty((len(text), 1), int)
        for kind, sign in enumerate(self.operations):
            chosen = problems.kind == kind
            a, b = problems.a[chosen], problems.b[chosen]
            rows, sizes = self._text(sign, a, b, offsets[chosen])
            width = min(length, rows.shape[1])
            text[chosen, :width] = rows[:, :width]
            ends[chosen, 0] = sizes
        column = np.arange(length)
        is_target = (column >= 2 * self.digits + 2) & (column <= ends) & (text != UNUSED)
        text[text == UNUSED] = ord("\n")
        alphabet = np.frombuffer(self.tokenizer.chars.encode(), np.uint8)
        ids = np.searchsorted(alphabet, text).astype(np.int32)
        return np.where(is_target, ids, ~ids)

    def solutions(self, problems: Problems) -> list[str]:
        """Return the characters of each problem's targets: working, answer and line break."""
        rows = self.windows(problems, self.longest)
        alphabet = self.tokenizer.chars
        return ["".join(alphabet[id] for id in row[row >= 0]) for row in rows]

    def _text(
        self, sign: str, a: np.ndarray, b: np.ndarray, offset: np.ndarray | int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write problems of one operation; return characters, uint8 [n, width], and lengths [n].

        The units stand at the place `offset`. Line breaks fill the row after a problem.
        """
        a, b = a * 10**offset, b * 10**offset
        digits = (characters(digits_of(number, self.digits)) for number in (a, b))
        x, y = (without_lowest(chain, offset)[::-1] for chain in digits)
        working = self._working(sign, a, b, offset) if self.forms["working"] else []
        solution = working + self._answer(sign, a, b, offset)
        if sign == "/":
            solution = [np.where(b == 0, BLANK, column) for column in solution]
            solution += [np.where(b == 0, letter, BLANK) for letter in repeat(UNDEFINED, len(a))]
        text = np.stack(x + repeat(sign, len(a)) + y + repeat("=", len(a)) + solution, axis=1)
        blanks_last = np.argsort(text == BLANK, axis=1, kind="stable")
        lengths = (text != BLANK).sum(1)
        text = np.take_along_axis(text, blanks_last, axis=1)
        return np.where(text == BLANK, ord("\n"), text), lengths

    def _working(self, sign: str, a: np.ndarray, b: np.ndarray, offset) -> list[np.ndarray]:
        """Return the characters of the working: its rows, and the mark at the end of each."""
        rows = OPERATIONS[sign](a, b, self.digits)
        columns = []
        for number, row in enumerate(rows, 1):
            for chain in row:
                columns += self._order(without_lowest(chain, 2 * offset))  # digits and carries
            columns += repeat("=" if number == len(rows) else ";", len(a))
        return columns

    def _answer(self, sign: str, a: np.ndarray, b: np.ndarray, offset) -> list[np.ndarray]:
        """Return the characters of the answers, blank where a number has no digit or sign."""
        if sign == "/":
            quotient, rest = np.divmod(a, np.maximum(b, 1))
            digits = self._spell(quotient, self.digits) + repeat(REMAINDER, len(a))
            return digits + self._spell(rest, divisor_digits(self.digits))
        if sign == "-":
            minus = np.where(a < b, ord("-"), BLANK)
            return [minus, *self._spell(np.abs(a - b), self.digits, offset)]
        if sign == "*":
            return self._spell(a * b, 2 * self.digits)
        return self._spell(a + b, self.digits + 1, offset)

    def _spell(self, number: np.ndarray, count: int, offset=0) -> list[np.ndarray]:
        """Return the digits of numbers as characters, blank in place of leading zeros."""
        digits = without_lowest(characters(digits_of(number, count)), offset)
        is_leading = [(number < 10**i) & (i > offset) for i in range(count)]
        pairs = zip(is_leading, digits, strict=True)
        return self._order([np.where(leading, BLANK, digit) for leading, digit in pairs])

    def _order(self, chain: list[np.ndarray]) -> list[np.ndarray]:
        return chain if self.forms["reverse_digits"] else chain[::-1]


def without_lowest(chain: Chain, count: np.ndarray | int) -> Chain:
    """Replace the first `count` characters of a chain, which differs between problems."""
    return [np.where(i < count, UNUSED, character) for i, character in enumerate(chain)]


def repeat(text: str, n: int) -> list[np.ndarray]:
    """Return the characters of a text, each for n problems."""
    return [np.full(n, ord(char), np.uint8) for char in text]


class TrainProblems(TokenSplit):
    """A split of endless training problems; a window's start is the key of its problem."""

    def __init__(self, task: Arithmetic, random_offset: bool = False):
        self.task, self.random_offset = task, random_offset
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
        keys = starts.view(np.uint64)
        problems = self.task.draw(keys)
        offsets = self.task.draw_offsets(problems, keys) if self.random_offset else 0
        return self.task.windows(problems, length, offsets)


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
    check_lengths(config)
    forms = {"working": config.working, "reverse_digits": config.reverse_digits}
    task = Arithmetic(operations, digits, train_digits=config.train_digits, **forms)
    least = task.longest - 1
    if block_size < least:
        problem = f"too short for {config.dataset} with digits={digits}"
        advice = f"expected at least {least}; try --block_size={least}"
        raise UserError(f"block_size={block_size}: {problem}; {advice}")
    train, val = TrainProblems(task, config.random_offset), ValProblems(task, block_size)
    vocab_size = task.tokenizer.vocab_size
    source = f"{operations} of numbers up to {digits} digits, {len(val.rows):,} held out"
    fingerprint = {"operations": operations, "digits": digits}  # the tokenizer holds the forms
    example = "7" * digits + operations[0] + "5" * digits + "="
    return Dataset(train, val, vocab_size, task.tokenizer, source, fingerprint, example)


def check_lengths(config: DataConfig) -> None:
    """Raise `UserError` if the lengths of training problems are impossible."""
    digits, train_digits = config.digits, config.train_digits
    if train_digits > digits:
        problem = f"more than digits={digits}, the most digits of any problem"
        advice = f"expected at most {digits}; try --train_digits={digits}"
        raise UserError(f"train_digits={train_digits}: {problem}; {advice}")
    if config.random_offset and train_digits in (0, digits):
        problem = f"training problems already reach all places of digits={digits}"
        advice = "expected train_digits below digits, or --random_offset=False"
        raise UserError(f"random_offset=True: {problem}; {advice}")
