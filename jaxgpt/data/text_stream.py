"""Decode the token ids of sequences to text while the ids arrive."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from jaxgpt.config import UserError
from jaxgpt.data.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence, decoded piece by piece, which ends before the first stop string.

    A stream holds back text that may still change: part of a character or of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        if "" in stop:
            raise UserError("stop='': is empty; expected at least one character")
        self._tokenizer = tokenizer
        self._stop = stop
        self._stop_prefixes = [text[:n] for text in stop for n in range(1, len(text))]
        self._shown = 0
        self.stopped = False

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """Return the new final text, given all ids so far; `last` holds nothing back."""
        text = self._tokenizer.decode(ids)
        if not last:
            text = text.rstrip("\ufffd")
        starts = {stop: text.find(stop) for stop in self._stop}
        found = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
        self.stopped = bool(found)
        if found:
            _, start = min(found)  # the stop string that ends first
            text = text[:start]
        elif not last:
            held_back = [len(p) for p in self._stop_prefixes if text.endswith(p)]
            text = text[: len(text) - max(held_back, default=0)]
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def stream_texts(
    chunks: Iterable[np.ndarray], streams: list[TextStream], active: np.ndarray, max_new_tokens: int
) -> Iterator[list[str]]:
    """Yield the new text of each sequence per chunk of ids [B, n]; ignore negative ids.

    Clear a sequence's entry in `active`, bool [B], once its stream has stopped.
    """
    ids: list[list[int]] = [[] for _ in streams]
    for ids_Bn in chunks:
        texts = [""] * len(streams)
        for row in np.flatnonzero(active):
            ids[row] += ids_Bn[row][ids_Bn[row] >= 0].tolist()
            texts[row] = streams[row].push(ids[row], last=len(ids[row]) == max_new_tokens)
            active[row] = not streams[row].stopped
        yield texts


def default_prompt(tokenizer: Tokenizer) -> str:
    """Return a line break, or else the text of the first token that is encoded to ids again."""

    def has_ids(text: str) -> bool:
        try:
            return len(tokenizer.encode(text)) > 0
        except UserError:
            return False

    tokens = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    return next(filter(has_ids, chain(["\n"], tokens)), "")


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
        raise UserError("prompt='': is empty; expected at least one character")
    streams = [TextStream(tokenizer, stop or tokenizer.stop) for _ in prompts]
    active = np.ones(len(prompts), bool)
    chunks = sampler.generate(ids, max_new_tokens=max_new_tokens, active=active, **options)
    return stream_texts(chunks, streams, active, max_new_tokens)
