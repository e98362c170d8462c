"""Files are whole or not there, and nothing else is left behind."""

import os

import pytest

from rho1_jax import files, jsonfile


def test_no_pattern_finds_a_draft(tmp_path):
    """One that a power cut leaves must not be taken for a tokenizer, or for rows."""
    with files.replacing(tmp_path / "tokenizer.json"):
        assert not list(tmp_path.glob("tokenizer.*"))
        assert len(names(tmp_path)) == 1


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("content", "stored"),
    [("naïve\r\n", "naïve\r\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")],
)
def test_text_and_bytes_are_stored_as_they_are(tmp_path, content, stored):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    files.write(path, content)
    assert path.read_bytes() == stored
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_writer_that_dies_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def die():
        with files.replacing(path) as stream:
            stream.write(b"half of")
            raise failure

    with pytest.raises(failure):
        die()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.npz"]


def test_nothing_is_seen_before_it_is_whole(tmp_path):
    path = tmp_path / "new.html"
    with files.replacing(path) as stream:
        stream.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    jsonfile.write(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        jsonfile.write(path, {"a": 2})
    assert jsonfile.read(path) == {"a": 1}
    assert names(tmp_path) == ["a.json"]
