"""Turns the token ids of one sequence into text while they arrive."""

import numpy as np

from jaxgpt.config import UserError
from jaxgpt.data.tokenizer import Tokenizer


def encode_prompts(tokenizer: Tokenizer, prompts: list[str]) -> list[np.ndarray]:
    """Token ids of each prompt. Raises `UserError` for one without tokens."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if any(len(i) == 0 for i in ids):
        raise UserError("start='': a prompt needs at least one character; a line break will do")
    return ids


class TextStream:
    """Decodes one sequence piece by piece, and ends its text before the first stop string.

    It holds back text that is not final yet: part of a character, or of a stop string. Raises
    `UserError` for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        if "" in stop:
            raise UserError("stop='': needs at least one character")
        self._tokenizer, self._stop, self._shown = tokenizer, stop, 0
        self.stopped = False

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """Returns the new final text, given all ids so far; `last` holds nothing back."""
        text = self._tokenizer.decode(ids)
        if not last:
            text = text.rstrip("\ufffd")
        starts = [(stop, text.find(stop)) for stop in self._stop]
        found = [(start + len(stop), start) for stop, start in starts if start >= 0]
        self.stopped = bool(found)
        if found:
            _, start = min(found)
            text = text[:start]
        elif not last:
            text = text[: len(text) - self._begun(text)]
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _begun(self, text: str) -> int:
        """The length of the longest beginning of a stop string that the text ends with."""
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(begun, default=0)
