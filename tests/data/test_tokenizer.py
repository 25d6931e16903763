"""Test tokenizers against their definitions, and GPT-2's against OpenAI's tiktoken."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tokenizers as hf
from helpers import refusal
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, last_break, load

ASTRAL = "nul \0, \u00e9, \uffff and \U0001f600, \U0010ffff\r\n"
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gpt2_ids.json").read_text())
# GPT-2's pattern distinguishes these characters; only Python treats \x1c as a space.
WORDS = st.text(st.sampled_from("ab'sd1.\u00e9\U0001f600 \n\t\r\x1c\x85\xa0"))


def toy_bpe() -> tokenizers.BpeTokenizer:
    """Return a BPE of ASCII, "ab" and "abab" that does not split the text into words."""
    vocab = {chr(i): i for i in range(128)} | {"ab": 128, "abab": 129}
    model = hf.models.BPE(vocab, [("a", "b"), ("ab", "ab")])
    bpe = hf.Tokenizer(model)
    bpe.decoder = hf.decoders.Fuse()
    return tokenizers.BpeTokenizer(bpe)


def assert_ids(actual, expected) -> None:
    """Assert that `actual` is a flat unsigned array with the expected ids."""
    assert actual.ndim == 1
    assert actual.dtype.kind == "u"
    assert actual.tolist() == list(expected)


@given(st.text())
@example(ASTRAL)
@example("\0")
@example("")
def test_char_ids_are_ranks_of_code_points(text):
    stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}  # nanoGPT's prepare.py
    tokenizer = CharTokenizer(text)
    assert tokenizer.vocab_size == len(stoi)
    assert_ids(tokenizer.encode(text), [stoi[ch] for ch in text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(), st.text())
@example("", "a")
@example("ab", "b\ufffd\U0001f600\0\ufffdc")
def test_char_tokenizer_names_exactly_the_unknown_characters(known, text):
    tokenizer, unknown = CharTokenizer(known), "".join(sorted(set(text) - set(known)))
    if not unknown:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    else:
        assert refusal(tokenizer.encode, text).startswith(f"text: no token for {unknown!r}; ")


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()])
def test_an_id_without_a_character_becomes_the_unknown_character(tokenizer):
    a, c = tokenizer.encode("ac")
    assert tokenizer.decode([a, 300, c]) == tokenizer.decode(np.array([a, 65_535, c])) == "a\ufffdc"


@pytest.mark.parametrize("text", ["a\ud800", "\udcff", "\udc80\ud800b"])
def test_half_a_character_is_refused(text, gpt2):
    for tokenizer in (ByteTokenizer(), gpt2):
        message = refusal(tokenizer.encode, text)
        assert message.endswith("is half a character; expected text in UTF-8")


@pytest.mark.parametrize("size", [65_536, 65_537, 70_000])
def test_char_ids_of_large_vocabularies_do_not_overflow(size):
    chars = "".join(map(chr, range(0xE000, 0xE000 + size)))  # past the surrogates
    ids = CharTokenizer(chars[::-1]).encode(chars)
    assert ids.dtype == (np.uint16 if size == 65_536 else np.uint32)
    np.testing.assert_array_equal(ids, np.arange(size))


@given(st.text())
@example(ASTRAL)
def test_byte_ids_are_utf8_bytes(text):
    assert ByteTokenizer().vocab_size == 256
    assert_ids(ByteTokenizer().encode(text), text.encode("utf-8"))
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
    assert ByteTokenizer().decode(np.array([0xFF, *b"a", 0xE2, 0x82])) == "\ufffda\ufffd"


def assert_same_after_json(tokenizer, text: str, folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = load(file, tokenizer.kind)
    assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
    assert_ids(loaded.encode(text), tokenizer.encode(text))
    assert loaded.decode(loaded.encode(text)) == text


@given(st.text())
@example(ASTRAL)
@example("")
def test_char_and_byte_tokenizers_round_trip_through_json(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("json")
    assert_same_after_json(CharTokenizer(text), text, folder)
    assert_same_after_json(ByteTokenizer(), text, folder)


def test_bpe_tokenizer_round_trips_through_json(gpt2, tmp_path):
    toy = toy_bpe()
    assert_ids(toy.encode("aababab b"), [97, 129, 128, 32, 98])
    assert toy.vocab_size == 130
    assert_same_after_json(toy, "aababab b", tmp_path)
    assert_same_after_json(gpt2, GOLDEN[-1]["text"], tmp_path)


BAD = [b"", b"{", b"\xff", b"[]", b"null", b"{}", b'{"type": "char"}', b'{"type": "words"}']


def test_loading_a_file_without_a_tokenizer_names_the_file(tmp_path):
    file = tmp_path / "some.json"
    assert "some.json: not a tokenizer" in refusal(load, file)
    for content in BAD:
        file.write_bytes(content)
        assert "some.json: not a tokenizer" in refusal(load, file), content


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_gpt2_ids_equal_tiktoken_ids(gpt2, golden):
    assert (gpt2.kind, gpt2.vocab_size) == ("gpt2", 50_257)
    assert_ids(gpt2.encode(golden["text"]), golden["ids"])
    assert gpt2.decode(golden["ids"]) == golden["text"]


@given(text=WORDS, size=st.integers(1, 9))
@example(text="aa\naa aa", size=3)
@example(text=GOLDEN[-1]["text"], size=1)
@example(text=GOLDEN[-1]["text"], size=40)
@example(text=GOLDEN[-1]["text"], size=300)
def test_gpt2_ids_do_not_depend_on_the_piece_size(gpt2, text, size):
    whole = gpt2.encode(text)  # one piece, at 65,536 characters each
    with patch.object(tokenizers, "PIECE_CHARS", size):
        assert_ids(gpt2.encode(text), whole.tolist())


@given(st.text() | WORDS)
@example(ASTRAL)
def test_gpt2_decode_inverts_encode(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.fixture(scope="session")
def gpt2_without_tiktoken(gpt2_data):
    """Return GPT-2's tokenizer as it is where tiktoken is not installed."""
    slow = tokenizers.gpt2(gpt2_data)
    with patch.dict(sys.modules, {"tiktoken": None}):
        assert slow.tiktoken is None
    return slow


def mixed_documents() -> list[str]:
    """Return documents of every golden text in random order, with very long words and spaces."""
    rng = np.random.default_rng(0)
    texts = [golden["text"] for golden in GOLDEN[:-1]]
    documents = ["".join(rng.permutation(texts)) for _ in range(300)]
    chars = "".join(texts)
    documents += ["".join(rng.choice([*chars], size=n)) for n in range(0, 2000, 10)]
    words = ["a" * 30_000, "\u4f60\u597d" * 9000, "1" * 20_000, "=" * 20_000, "ab\u00e9" * 9000]
    spaces = [f"x{c * 20_000}y{c * 9000}" for c in " \n\u3000"] + ["x" + " \n\t" * 9000]
    return documents + words + spaces + [END_OF_TEXT, f" {END_OF_TEXT}", f"a{END_OF_TEXT}" * 2000]


def test_documents_have_the_same_ids_with_and_without_tiktoken(gpt2, gpt2_without_tiktoken):
    pytest.importorskip("tiktoken")
    assert gpt2.tiktoken is not None
    documents = mixed_documents()
    ids = gpt2.encode_documents(documents)
    assert (ids == gpt2.eot).sum() == len(documents), "end-of-text within a text is plain text"
    assert_ids(ids, gpt2_without_tiktoken.encode_documents(documents).tolist())


@given(st.lists(st.text() | WORDS))
def test_any_documents_have_the_same_ids_without_tiktoken(gpt2, gpt2_without_tiktoken, documents):
    pytest.importorskip("tiktoken")
    ids = gpt2_without_tiktoken.encode_documents(documents)
    assert_ids(gpt2.encode_documents(documents), ids.tolist())


def test_pieces_stay_short_after_a_long_word():
    """One long word must not send the rest of a text through the slower library."""
    words = "to be or not " * 20_000
    pieces = tokenizers._cut("x" * 200_000 + " " + words)
    assert len(pieces[0]) < 200_000 + tokenizers.PIECE_CHARS
    assert max(map(len, pieces[1:])) <= tokenizers.PIECE_CHARS
    assert "".join(pieces) == "x" * 200_000 + " " + words


def test_vocabulary_reaches_to_the_largest_id_if_ids_have_gaps():
    ids = {"a": 0, "b": 70_000}
    bpe = tokenizers.BpeTokenizer(hf.Tokenizer(hf.models.WordLevel(ids, unk_token="a")))
    assert bpe.vocab_size == 70_001
    assert bpe.encode("b").tolist() == [70_000]


def test_a_million_spaces_do_not_overflow_the_stack_of_tiktoken(gpt2):
    ids = gpt2.encode_documents(["a" + " " * 1_100_000 + "b", "a b"])
    assert len(ids) > 1_100_000
    assert_ids(ids[-3:], [64, 275, gpt2.eot])


@given(WORDS, st.integers(0, 5), st.integers(0, 30))
def test_last_break_equals_exhaustive_search(text, start, stop):
    start, stop = min(start, len(text)), min(stop, len(text))

    def breaks(mark: str) -> list[int]:
        places = range(start + 1, stop)
        return [i for i in places if text[i] == mark and not text[i - 1].isspace()]

    assert last_break(text, start, stop) == max(breaks("\n") or breaks(" ") or [0])


TOY_VOCAB = json.dumps({"a": 0, "b": 1, "ab": 2}).encode()
TOY_MERGES = b"#version: 0.2\na b\n"


@pytest.mark.parametrize("found", [None, b"", TOY_VOCAB[:-5]], ids=["none", "empty", "cut short"])
def test_gpt2_files_are_downloaded_once_if_missing_or_damaged(monkeypatch, tmp_path, web, found):
    files = web.put("vocab.bpe", TOY_MERGES), web.put("encoder.json", TOY_VOCAB)
    monkeypatch.setattr(tokenizers, "GPT2_FILES", files)
    if found is not None:
        (tmp_path / "gpt2").mkdir()
        (tmp_path / "gpt2" / "encoder.json").write_bytes(found)
    for _ in range(2):
        assert_ids(tokenizers.gpt2(tmp_path).encode("abab<|endoftext|>b"), [2, 2, 3, 1])
        assert sorted(web.asked) == ["/encoder.json", "/vocab.bpe"]
    assert (tmp_path / "gpt2" / "vocab.bpe").read_bytes() == TOY_MERGES


def test_unavailable_gpt2_files_are_rejected_with_the_url(tmp_path, web, no_gpt2):
    message = refusal(tokenizers.gpt2, tmp_path)
    assert message.startswith(f"{tmp_path}/gpt2: GPT-2's tokenizer is not in it and could not be ")
    assert f"; expected {web.url}/vocab.bpe and {web.url}/encoder.json; try to put both" in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
