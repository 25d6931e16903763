"""Encode prompts and completions, one JSON object per line; only completions are targets."""

import json
from collections.abc import Iterable, Iterator

import numpy as np

from jaxgpt.config import UserError
from jaxgpt.data.tokenizer import END_OF_TEXT, Tokenizer
from jaxgpt.data.tokens import SplitIds


def scan_examples(pieces: Iterable[str]) -> tuple[set[str], int]:
    """Collect the characters, with the line break that ends a completion; count the examples."""
    chars, count = {"\n"}, 0
    for prompt, completion in read_examples(pieces):
        chars.update(prompt, completion)
        count += 1
    return chars, count


def encode_examples(pieces: Iterable[str], encoder: Tokenizer, train_examples: int) -> SplitIds:
    """Yield each example's split and its ids, int32: `~id` for the prompt, then the completion.

    A completion ends with GPT-2's <|endoftext|> if the tokenizer is a BPE, else with a line break.
    The first `train_examples` are train, the rest val.
    """
    end = encoder.encode(end_of_completion(encoder))
    for number, (prompt, completion) in enumerate(read_examples(pieces)):
        ids = ~encoder.encode(prompt).astype(np.int32), encoder.encode(completion), end
        split = "train" if number < train_examples else "val"
        yield split, np.concatenate(ids, dtype=np.int32, casting="unsafe")


def end_of_completion(encoder: Tokenizer) -> str:
    """Return the text of the token that ends a completion. Raises `UserError` if there is none."""
    is_bpe = encoder.kind not in ("char", "byte")
    if is_bpe and encoder.eot is None:
        problem = f"has no {END_OF_TEXT}, with which a completion ends"
        raise UserError(f"tokenizer: {problem}; expected gpt2, or a tokenizer.json that has it")
    return END_OF_TEXT if is_bpe else "\n"


def read_examples(pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the prompt and completion of every line that is not blank. Raises `UserError`."""
    for number, line in enumerate(_lines(pieces), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            prompt, completion = example["prompt"], example["completion"]
            str.encode(prompt + completion)  # fails for other types, and for half a character
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            form = 'an object with two texts; try {"prompt": "2+2=", "completion": "4"}'
            raise UserError(
                f"line {number}: found {line.strip()[:60]!r}; expected {form}"
            ) from error
        yield prompt, completion


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest
