"""Files that are written whole or not at all: a crash or a full disk leaves the old one, or none;
and their checksums, in a file beside them.

JSON has its own reader and writer on top of this (jsonfile.py).
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rho1_jax.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream of bytes that takes the place of `path` when the block ends without an exception.

    One writer at a time: the draft lies beside it as .NAME.draft, which no pattern
    for NAME finds. Raises OSError as `open` does.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut could leave the new name on an empty file
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """`content` as `path`, text in UTF-8 with its line ends as they are. Raises as `replacing`."""
    with replacing(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def seal(path: Path) -> None:
    """Keep the checksum of `path` beside it, as `sha256sum --check` reads it."""
    write(_seal(path), f"{sha256(path)}  {path.name}\n")


def unseal(path: Path) -> None:
    """Before `path` is changed: forget its checksum."""
    _seal(path).unlink(missing_ok=True)


def require_sealed(path: Path, otherwise: str) -> None:
    """InputError if the checksum beside the file is not its own, or the file is gone; `otherwise`:
    what to do then. A file without a checksum is taken as it is."""
    if not _seal(path).is_file():
        return
    if not path.exists():
        raise InputError(
            f"{path} is gone, only its checksum {_seal(path).name} is there: {otherwise}."
        )
    if _seal(path).read_bytes()[:64] != sha256(path).encode():
        raise InputError(
            f"{path} is damaged, its checksum is not the one in {_seal(path).name}: {otherwise}."
        )


def sealed(folder: Path) -> list[Path]:
    """The files in a folder that have a checksum beside them, also those that are gone."""
    return [seal.with_name(seal.name[1 : -len(".sha256")]) for seal in folder.glob(".*.sha256")]


def _seal(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def sha256(path: Path) -> str:
    """Hex, of the file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
