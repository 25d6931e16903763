"""Turns the token ids of sequences into text while they arrive."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxgpt.config import UserError
from jaxgpt.data.tokenizer import Tokenizer


class TextStream:
    """Decodes one sequence piece by piece, and ends its text before the first stop string.

    It holds back text that is not final yet: part of a character, or of a stop string.
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
            text = text[: min(found)[1]]
        elif not last:
            begins = [stop[:n] for stop in self._stop for n in range(1, len(stop))]
            begun = [len(begin) for begin in begins if text.endswith(begin)]
            text = text[: len(text) - max(begun, default=0)]
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def stream_texts(
    chunks: Iterable[np.ndarray], streams: list[TextStream], active: np.ndarray, max_new_tokens: int
) -> Iterator[list[str]]:
    """Yields each sequence's new text per chunk of ids [B, n], where a negative id is none.

    Clears a sequence's entry in `active`, bool [B], once its stream has stopped.
    """
    ids: list[list[int]] = [[] for _ in streams]
    for ids_Bn in chunks:
        texts = [""] * len(streams)
        for row in np.flatnonzero(active):
            ids[row] += ids_Bn[row][ids_Bn[row] >= 0].tolist()
            texts[row] = streams[row].push(ids[row], last=len(ids[row]) == max_new_tokens)
            active[row] = not streams[row].stopped
        yield texts


def generate_text(
    sampler: Any, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int, *,
    stop: tuple[str, ...] = (), **options: Any,
) -> Iterator[list[str]]:  # fmt: skip
    """Yield the text that continues each prompt, in pieces; `options` are `Sampler.generate`'s.

    Raises `UserError`, before the first piece is asked for, for a prompt without tokens, a
    character without a token, or an empty stop string.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if any(len(i) == 0 for i in ids):
        raise UserError("start='': the prompt is empty; expected at least one character")
    streams = [TextStream(tokenizer, stop or tokenizer.stop) for _ in prompts]
    active = np.ones(len(prompts), bool)
    chunks = sampler.generate(ids, max_new_tokens=max_new_tokens, active=active, **options)
    return stream_texts(chunks, streams, active, max_new_tokens)
