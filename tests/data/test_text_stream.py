"""Test that `TextStream` shows the same text for every split of the token ids."""

import tokenizers as library
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.data.text_stream import TextStream, default_prompt
from jaxgpt.data.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer


def test_samples_start_from_a_text_that_has_ids():
    assert default_prompt(CharTokenizer("\nab")) == "\n"
    assert default_prompt(CharTokenizer("ab")) == "a"  # a line break is an error
    words = library.Tokenizer(library.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    tokenizer = BpeTokenizer(words)
    assert len(tokenizer.encode("\n")) == 0
    assert default_prompt(tokenizer) == "a"


def until_stop(text: str, stops: tuple[str, ...]) -> str:
    """Return the text before the first stop string, searching one character at a time."""
    for read in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:read].endswith(stop)]
        if ended:
            return text[: read - max(map(len, ended))]
    return text


def push_all(stream: TextStream, ids: list[int], cuts: list[int]):
    """Yield the ids and the text shown so far after each piece, until the stream stops."""
    shown = ""
    for end in [*sorted({cut % (len(ids) + 1) for cut in cuts}), len(ids)]:
        shown += stream.push(ids[:end], last=False)
        yield ids[:end], shown
        if stream.stopped:
            return
    yield ids, shown + stream.push(ids, last=True)


CUTS = st.lists(st.integers(0, 1000), max_size=12)


@given(
    st.text("ab.", max_size=20),
    st.lists(st.text("ab.", min_size=1, max_size=5), max_size=3).map(tuple),
    CUTS,
)
@example("xab", ("abc", "b"), [2])
@example("aabaab.", ("aab.",), [1, 2, 3, 4, 5, 6])
def test_streamed_text_ends_before_the_stop_string_for_any_split(text, stops, cuts):
    """Text that is held back must be the beginning of a stop string."""
    tokenizer = CharTokenizer("ab.cx")
    stream = TextStream(tokenizer, stops)
    for ids, shown in push_all(stream, tokenizer.encode(text).tolist(), cuts):
        so_far = until_stop(tokenizer.decode(ids), stops)
        assert so_far.startswith(shown)
        held = so_far[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    assert shown == until_stop(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


@given(
    st.text("aé€😀\x80", max_size=10),
    st.lists(st.text("aé€", min_size=1), max_size=2).map(tuple),
    CUTS,
)
@example("aé", ("aé",), [2])
@example("a€aé", ("aé",), [3, 5, 6])
def test_incomplete_characters_are_held_back_and_complete_ones_are_shown(text, stops, cuts):
    ids = ByteTokenizer().encode(text).tolist()
    for so_far, shown in push_all(TextStream(ByteTokenizer(), stops), ids, cuts):
        assert until_stop(text, stops).startswith(shown)
        assert stops or shown == bytes(so_far).decode(errors="ignore")
    assert shown == until_stop(text, stops)


@given(st.binary(max_size=12), CUTS)
@example(b"\xe2\x82", [1])
@example(b"\xff\xe2\x82A", [1, 2, 3])
def test_streamed_pieces_of_any_bytes_concatenate_to_the_text(ids, cuts):
    for _, shown in push_all(TextStream(ByteTokenizer()), list(ids), cuts):
        assert ids.decode(errors="replace").startswith(shown)
    assert shown == ids.decode(errors="replace")
