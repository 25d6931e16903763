"""Test that files are replaced completely or not at all."""

import hashlib

import pytest

from jaxgpt.runtime.files import atomic_path, atomic_write, sha256_of


@pytest.mark.parametrize("data", ["", "Größe\n", b"\x00\xff"])
def test_atomic_write_replaces_the_file_and_leaves_no_other_file(data, tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    atomic_write(file, data)
    content = data.encode() if isinstance(data, str) else data
    assert file.read_bytes() == content
    assert sha256_of(file) == hashlib.sha256(content).hexdigest()
    assert [*tmp_path.iterdir()] == [file]


def write_half(file, error: type[BaseException]) -> None:
    with atomic_path(file) as partial:
        assert partial.suffix == ".png"  # writers choose the format by the suffix
        partial.write_text("half of the n")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_write_keeps_the_old_file(error, tmp_path):
    file = tmp_path / "loss.png"
    file.write_text("old")
    with pytest.raises(error):
        write_half(file, error)
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_writers_of_a_shared_file_get_different_temporary_paths(tmp_path):
    file = tmp_path / "a"
    with atomic_path(file, shared=True) as first, atomic_path(file, shared=True) as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert file.read_text() == "1"  # the last to end
