"""Write the working of arithmetic problems digit by digit, as on paper.

Each digit follows from a few digits before it, which a small model can learn. n problems are
written at once: a digit, like a character, is an array [n].
"""

from collections.abc import Iterable

import numpy as np

Digits = list[np.ndarray]  # of a number, units first, int64
Chain = list[np.ndarray]  # characters that belong to one number, units first, uint8
Row = list[Chain]


def digits_of(number: np.ndarray, count: int) -> Digits:
    """Return the last `count` digits of natural numbers."""
    return [number // 10**i % 10 for i in range(count)]


def characters(digits: Iterable[np.ndarray]) -> Chain:
    """Return digits as ASCII codes."""
    return [(ord("0") + digit).astype(np.uint8) for digit in digits]


def carry_chain(totals: Iterable[np.ndarray]) -> tuple[Digits, Digits]:
    """Return the digit of each total, to which the carry before it is added, and the carries.

    A carry is the total divided by ten and rounded down, so a negative total borrows: -1.
    """
    digits, carries = [], []
    carry = np.int64(0)
    for total in totals:
        carry, digit = np.divmod(total + carry, 10)
        digits.append(digit)
        carries.append(carry)
    return digits, carries


def alternate(digits: Digits, carries: Digits) -> Chain:
    """Return each digit and then its carry, as characters; a borrow is written as 1."""
    pairs = zip(digits, carries, strict=True)
    return characters(np.abs(number) for pair in pairs for number in pair)


def addition(a: np.ndarray, b: np.ndarray, count: int) -> list[Row]:
    """Write each digit of the sum, and its carry."""
    totals = [x + y for x, y in zip(digits_of(a, count), digits_of(b, count), strict=True)]
    return [[alternate(*carry_chain(totals))]]


def subtraction(a: np.ndarray, b: np.ndarray, count: int) -> list[Row]:
    """Write each digit of the difference and its borrow, and after it the distance.

    If the last digit borrows, the difference is negative. Then the distance is what remains when
    the digits of the difference are subtracted from zero, with a borrow after each as well.
    """
    x, y = digits_of(a, count), digits_of(b, count)
    digits, borrows = carry_chain([p - q for p, q in zip(x, y, strict=True)])
    distance = carry_chain([np.where(a < b, -digit, digit) for digit in digits])
    return [[alternate(digits, borrows)], [alternate(*distance)]]


def multiplication(a: np.ndarray, b: np.ndarray, count: int) -> list[Row]:
    """Write the product of `a` and each digit of `b`, and after it the sum so far.

    The units of a sum take part in no later sum, so each row begins at the next digit.
    """
    x = digits_of(a, count)
    rows: list[Row] = []
    sum_so_far = None
    for factor in digits_of(b, count):
        digits, carries = carry_chain([digit * factor for digit in x])
        rows.append([alternate(digits, carries)])
        product = [*digits, carries[-1]]
        if sum_so_far is not None:
            totals = [p + s for p, s in zip(product, sum_so_far, strict=True)]
            product, carries = carry_chain(totals)
            rows.append([alternate(product, carries)])
        sum_so_far = [*product[1:], np.zeros_like(a)]
    return rows


def division(a: np.ndarray, b: np.ndarray, count: int) -> list[Row]:
    """Write 2, 4 and 8 times the divisor, and a row for each digit of the quotient.

    A row compares what is left with 8, 4, 2 and 1 times the divisor, and subtracts each that fits.
    Its last character is the digit.
    """
    size = divisor_digits(count)
    rows: list[Row] = [[characters(digits_of(times * b, size + 1)) for times in (2, 4, 8)]]
    rest = np.zeros_like(a)
    for digit in reversed(digits_of(a, count)):
        rest = 10 * rest + digit
        quotient = np.zeros_like(a)
        row: Row = []
        for times in (8, 4, 2, 1):
            row += comparison(rest, times * b, size + 1)
            fits = rest >= times * b
            rest = rest - fits * times * b
            quotient = quotient + times * fits
            row.append(characters(digits_of(rest, size if times == 1 else size + 1)))
        rows.append([*row, characters([quotient])])
    return rows


def comparison(a: np.ndarray, b: np.ndarray, count: int) -> Row:
    """Compare the digits of two numbers from the top: the first that differs decides."""
    pairs = zip(digits_of(a, count)[::-1], digits_of(b, count)[::-1], strict=True)
    signs = [np.where(x < y, ord("<"), np.where(x > y, ord(">"), ord("~"))) for x, y in pairs]
    return [[sign.astype(np.uint8)] for sign in signs]


def divisor_digits(count: int) -> int:
    """Return the most digits of a divisor, in problems of numbers with up to `count` digits."""
    return min(count, 2)


OPERATIONS = {"+": addition, "-": subtraction, "*": multiplication, "/": division}
