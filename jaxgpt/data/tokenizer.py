"""Convert text to token ids and back: characters, bytes, or byte-pair encoding; stored as JSON."""

import json
import re
from copy import copy
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from jaxgpt.config import UserError
from jaxgpt.data.text import Download, fetch
from jaxgpt.data.working import divisor_digits
from jaxgpt.runtime.files import reason

FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
UNDEFINED, REMAINDER = "undefined", "r"  # in answers to divisions
PIECE_CHARS = 1 << 16
UNKNOWN = 0xFFFD  # the code point that stands for an id or a byte without a character


class Tokenizer(Protocol):
    """The interface of all tokenizers. `kind` names the type in `meta.json`."""

    kind: str
    vocab_size: int
    eot: int | None = None  # the id that ends a document, if there is one
    stop: tuple[str, ...] = ()  # strings that end a sample, unless the user names others

    def encode(self, text: str) -> np.ndarray: ...  # unsigned [n]; raises `UserError`
    def decode(self, ids) -> str: ...
    def to_json(self) -> str: ...  # what `load` reads


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the narrowest dtype of token files that holds these ids."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class CharTokenizer(Tokenizer):
    """A tokenizer with one id per character, by code point, as in nanoGPT's shakespeare_char."""

    kind = "char"

    def __init__(self, chars: str):
        self.chars = "".join(sorted(set(chars)))
        self.vocab_size = len(self.chars)
        self._code_of = _code_points(self.chars)
        self._id_of = np.full(0x110000, -1, np.int32)
        self._id_of[self._code_of] = np.arange(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = self._id_of[codes]
        if (ids < 0).any():
            unknown = "".join(sorted({chr(code) for code in codes[ids < 0]}))
            known = f"only the {self.vocab_size} characters {self.chars!r}"
            raise UserError(f"text: no token for {unknown!r}; expected {known}")
        return ids.astype(id_dtype(self.vocab_size))

    def decode(self, ids) -> str:
        ids = np.asarray(ids, np.int64)
        codes = np.full(ids.shape, UNKNOWN, self._code_of.dtype)
        is_known = ids < self.vocab_size
        codes[is_known] = self._code_of[ids[is_known]]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> str:
        return json.dumps({"type": self.kind, "chars": self.chars})


class ArithmeticTokenizer(CharTokenizer):
    """A tokenizer of problems such as 123+456= and of their answers, which end with a line break.

    In the ids, the numbers of a problem have leading zeros, so that their digits line up. The
    digits of an answer are reversed if `reverse_digits`. With `working`, the working and another
    equals sign stand before the answer; the text leaves them out unless `shows_working`. A number
    or working that may go on decodes to U+FFFD, as half a character would.
    """

    kind = "arithmetic"
    stop = ("\n",)
    shows_working = False

    def __init__(
        self, operations: str, digits: int, *, working: bool = False, reverse_digits: bool = True
    ):
        minus = "-" if "-" in operations else ""
        words = UNDEFINED + REMAINDER if "/" in operations else ""
        marks = ";<~>" if working else ""
        super().__init__(f"\n0123456789={operations}{minus}{words}{marks}")
        self.operations, self.digits = operations, digits
        self.forms = {"working": working, "reverse_digits": reverse_digits}
        second = {sign: divisor_digits(digits) if sign == "/" else digits for sign in operations}
        number = lambda size: rf"(0|[1-9]\d{{0,{size - 1}}})"
        rest = "|".join(re.escape(sign) + number(size) for sign, size in second.items())
        self._problem = re.compile(f"{number(digits)}({rest})=")

    def encode(self, text: str) -> np.ndarray:
        if not self._problem.fullmatch(text):
            parts = f"two numbers of at most {self.digits} digits"
            if "/" in self.operations and self.digits > divisor_digits(self.digits):
                parts += f" (a divisor of at most {divisor_digits(self.digits)})"
            example = f"{'12'[: self.digits]}{self.operations[0]}{'34'[: self.digits]}="
            expected = f"{parts} and one of {' '.join(self.operations)}; try {example}"
            raise UserError(f"{text!r}: is not a problem; expected {expected}")
        return super().encode(re.sub(r"\d+", lambda n: n[0].zfill(self.digits), text))

    def decode(self, ids) -> str:
        return "".join(map(self.read, super().decode(ids).splitlines(keepends=True)))

    def read(self, line: str) -> str:
        """Return the text of a line of characters: a problem, its solution, both, or a part."""
        found = re.match(r"\d+[-+*/]\d+=", line)
        problem = found[0] if found else ""
        working, mark, answer = line.removeprefix(problem).rpartition("=")
        if self.forms["working"] and not mark:
            working, answer = answer, ""
        if self.forms["reverse_digits"]:
            answer = re.sub(r"\d+(?=\D)", lambda number: number[0][::-1], answer)
            answer = re.sub(r"\d+\Z", "\ufffd", answer)  # more digits may follow
        if not self.shows_working and not working.endswith("\n"):
            working, mark = "" if mark or not working else "\ufffd", ""
        return re.sub(r"(?<!\d)0+(?=\d)", "", problem) + working + mark + answer

    def to_json(self) -> str:
        fields = {"type": self.kind, "operations": self.operations, "digits": self.digits}
        return json.dumps(fields | self.forms)


def with_working(tokenizer: Tokenizer) -> ArithmeticTokenizer:
    """Return a tokenizer whose text contains the working. Raises `UserError` if there is none."""
    if not (isinstance(tokenizer, ArithmeticTokenizer) and tokenizer.forms["working"]):
        expected = "expected a run of --dataset=calculator with --working=True"
        raise UserError(f"show_working=True: the model writes no working; {expected}")
    shown = copy(tokenizer)
    shown.shows_working = True
    return shown


def to_utf8(text: str) -> bytes:
    """Encode a text. Raises `UserError` for half a character, which UTF-8 cannot hold."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"{text[error.start]!r} is half a character"
        raise UserError(f"text: {problem}; expected text in UTF-8") from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class ByteTokenizer(Tokenizer):
    """A tokenizer with one id per byte of UTF-8, which can encode any text."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.uint16)

    def decode(self, ids) -> str:
        in_bytes = np.minimum(ids, 0xFF).astype(np.uint8)  # 0xFF is in no character
        return in_bytes.tobytes().decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": self.kind})


class BpeTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library `tokenizers`, such as GPT-2's."""

    def __init__(self, bpe: tokenizers.Tokenizer, kind: str = "bpe"):
        self.kind = kind
        self.vocab_size = 1 + max(bpe.get_vocab().values(), default=-1)  # ids may have gaps
        self.eot = bpe.token_to_id(END_OF_TEXT)
        self._bpe = bpe

    def encode(self, text: str) -> np.ndarray:
        to_utf8(text)  # the library's own error names no character
        return self._join(self._encode_pieces(_cut(text)))

    def encode_documents(self, documents: list[str]) -> np.ndarray:
        """Encode documents with an end-of-text after each; <|endoftext|> inside is plain text."""
        cuts = [_cut(text) for text in documents]
        encoded = iter(self._encode_plain(list(chain.from_iterable(cuts))))
        end = np.array([self.eot], np.uint32)
        ids: list[np.ndarray] = []
        for pieces in cuts:
            ids += [*islice(encoded, len(pieces)), end]
        return self._join(ids)

    def _encode_plain(self, pieces: list[str]) -> list[np.ndarray]:
        """Encode pieces in which <|endoftext|> is plain text."""
        # `_cut` leaves runs of spaces whole, and on a million spaces tiktoken overflows its stack
        if self.tiktoken and max(map(len, pieces), default=0) <= PIECE_CHARS:
            encode = self.tiktoken.encode_ordinary
            return [np.array(encode(piece), np.uint32) for piece in pieces]
        self._bpe.encode_special_tokens = True
        encoded = self._encode_pieces(pieces)
        self._bpe.encode_special_tokens = False
        return encoded

    @cached_property
    def tiktoken(self) -> Any:
        """GPT-2's encoding by tiktoken; None for other encodings, and if it is not installed."""
        return tiktoken_gpt2(self._bpe) if self.kind == "gpt2" else None

    def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        encoded = self._bpe.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(piece.ids, np.uint32) for piece in encoded]  # a list is nine times larger

    def _join(self, pieces: list[np.ndarray]) -> np.ndarray:
        empty = np.array([], np.uint32)
        return np.concatenate([*pieces, empty]).astype(id_dtype(self.vocab_size))

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token."""
        return self._bpe.get_vocab()

    def decode(self, ids) -> str:
        return self._bpe.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        return self._bpe.to_str()


def _cut(text: str) -> list[str]:
    """Cut a text between words into pieces to be encoded in parallel."""
    pieces, start = [], 0
    while start < len(text):
        searched, stop, cut = start, start + PIECE_CHARS, 0
        while stop < len(text) and not cut:
            cut = last_break(text, searched, stop)
            searched, stop = stop - 1, stop + PIECE_CHARS  # if there is no break so far
        pieces.append(text[start : cut or len(text)])
        start = cut or len(text)
    return pieces


def last_break(text: str, start: int, stop: int) -> int:
    """Return the last line break in text[start:stop] that follows a visible character, or 0.

    GPT-2's pattern always ends a word at such a break, so a cut at the break does not change the
    ids. The same is true of a space, which is the second choice. Other encodings may join a break
    with its neighbours; the ids then differ a little at the cuts.
    """
    for mark in "\n ":
        at = text.rfind(mark, start + 1, stop)
        while at > 0 and text[at - 1].isspace():
            at = text.rfind(mark, start + 1, at)
        if at > 0:
            return at
    return 0


GPT2_FILES = tuple(
    Download(f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}", sha256)
    for name, sha256 in (
        ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    )
)


# GPT-2's pattern of words, as in tiktoken, where ++ never gives back what it has matched
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def gpt2(data_dir: str | Path) -> BpeTokenizer:
    """Load GPT-2's encoding (Radford et al. 2019) from `data_dir`/gpt2 or OpenAI's server.

    Raises `UserError`, which names both files and their folder, if they cannot be downloaded.
    """
    folder = Path(data_dir, "gpt2")
    merges, vocab = (str(folder / Path(file.url).name) for file in GPT2_FILES)
    try:
        for download, file in zip(GPT2_FILES, (merges, vocab), strict=True):
            fetch(download, Path(file))
    except UserError as error:
        cause = type(error.__cause__).__name__
        files = " and ".join(download.url for download in GPT2_FILES)
        raise UserError(
            f"{folder}: GPT-2's tokenizer is not in it and could not be downloaded ({cause}); "
            f"expected {files}; try to put both files into {folder}"
        ) from error
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT])
    return BpeTokenizer(bpe, "gpt2")


def tiktoken_gpt2(bpe: tokenizers.Tokenizer) -> Any:
    """Make tiktoken's encoding from GPT-2's; return None if tiktoken is not installed.

    tiktoken merges the pair with the lowest id first. GPT-2's ids are in the order of its merges,
    so both libraries give the same ids.
    """
    try:
        import tiktoken
    except ImportError:
        return None
    # GPT-2 writes each byte as a printable character: as itself, or as one from chr(256) on
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    vocab = bpe.get_vocab()
    del vocab[END_OF_TEXT]
    ids = {bytes(byte_of[char] for char in token): id for token, id in vocab.items()}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ids, special_tokens={})


def find(name: str, data_dir: str) -> Tokenizer | None:
    """Return the tokenizer that `name` stands for (gpt2, byte, or a file), or None."""
    if name == "gpt2":
        return gpt2(data_dir)
    if name == "byte":
        return ByteTokenizer()
    return load(name) if Path(name).is_file() else None


def check_same(dataset: str, ours: Tokenizer | None, file: Path) -> None:
    """Raise `UserError` if a dataset's tokenizer gives other ids than the tokenizer in `file`.

    A tokenizer that is unknown, or a file that is missing, is not compared.
    """
    if ours is None or not file.is_file():
        return
    theirs = load(file)
    if not same_ids(ours, theirs):
        sizes = f"{ours.vocab_size} and {theirs.vocab_size} ids"
        raise UserError(
            f"dataset={dataset!r}: its tokenizer is not the one in {file} ({sizes}); expected the "
            f"tokenizer of the model; try jaxgpt prepare FILE --tokenizer={file}"
        )


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Tell whether two tokenizers give the same id to every token."""
    if isinstance(a, BpeTokenizer) and isinstance(b, BpeTokenizer):
        return a.vocabulary() == b.vocabulary()  # files of one BPE may differ in other settings
    return a.to_json() == b.to_json()


def load(file: str | Path, kind: str = "bpe") -> Tokenizer:
    """Load the tokenizer in a JSON file. Raises `UserError` if the file holds none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        match json.loads(text):
            case {"type": "char", "chars": str(chars)}:
                return CharTokenizer(chars)
            case {"type": "byte"}:
                return ByteTokenizer()
            case {"type": "arithmetic", "operations": str(signs), "digits": int(digits), **forms}:
                if forms or "/" not in signs:  # divisions without remainder had other ids
                    return ArithmeticTokenizer(signs, digits, **forms)
        return BpeTokenizer(tokenizers.Tokenizer.from_str(text), kind)
    except Exception as error:  # the library raises plain Exception for what it cannot read
        expected = "a tokenizer.json of jaxgpt or of Hugging Face"
        problem = f"not a tokenizer ({reason(error)})"
        raise UserError(f"{file}: {problem}; expected {expected}") from error
