"""The records of one file: JSON lines or an array, parquet, text; read in bounded pieces.

What cannot be used is counted, never fatal: see `corpora.split_documents`.
"""

import codecs
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rho1_jax.errors import InputError

GIANT = 1_000_000  # characters; a longer document becomes several
_JSON = (".jsonl", ".json", ".ndjson")  # lines are called by all of these names
SUFFIXES = (
    *(name + packed for name in _JSON for packed in ("", ".gz", ".zst")),
    ".parquet",
    ".txt",
)
MESSAGES = "messages"  # the field that may hold a list: a conversation
_PEEK = 2**16  # bytes read at once
_LINE = 2**28  # bytes; a longer JSON line counts as malformed

_DAMAGE = (
    OSError, EOFError, zlib.error, pyarrow.ArrowException, json.JSONDecodeError, RecursionError
)  # fmt: skip

Record = Mapping[str, Any]


def records(
    path: Path, choices: Sequence[set[str]], counts: Counter[str]
) -> Iterator[Record | None]:
    """Streams the records of a file; None for one that is malformed.

    choices: sets of fields of which one is needed; parquet files are read no further than that.
    counts: receives `invalid` and `giant`.

    Raises:
        InputError: the file is damaged, or a parquet file has none of the choices, or lists there.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path, choices)
            return
        with _open(path) as stream:
            read = _txt_records if path.suffix == ".txt" else _json_records
            yield from read(stream, counts)
    except _DAMAGE as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}): it may be damaged or cut short."
        ) from error


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(raw, 2**16)
    return path.open("rb")


def _json_records(stream: Any, counts: Counter[str]) -> Iterator[Record | None]:
    if stream.peek(_PEEK)[:_PEEK].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _array_records(stream)
        return
    while line := stream.readline(_LINE):
        part = line
        while len(part) == _LINE and not part.endswith(b"\n"):  # read past what is too long
            part = stream.readline(_LINE)
        if not line.strip():
            continue
        try:
            record = json.loads(decoded(line.removeprefix(codecs.BOM_UTF8), counts))
        except (ValueError, RecursionError):
            record = None
        yield record if isinstance(record, dict) else None


def _array_records(stream: io.BufferedIOBase) -> Iterator[Record | None]:
    """The elements of one JSON array, of which never much more than one is in memory."""
    decoder = json.JSONDecoder()
    # What is not UTF-8 becomes half a surrogate pair, which who takes the text counts.
    utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    raw = stream.read(_PEEK)
    text, at = utf8.decode(raw).lstrip()[1:], 0
    while True:
        at += len(text[at : at + _PEEK]) - len(text[at : at + _PEEK].lstrip(" \t\r\n,"))
        if text.startswith("]", at):
            if text[at + 1 :].strip() or stream.read(_PEEK).strip():
                raise json.JSONDecodeError("More follows the array", text, at)
            return
        try:
            value, stop = decoder.raw_decode(text, at)
            if stop == len(text) and raw:  # a number may go on
                raise json.JSONDecodeError("Cut", text, stop)
        except json.JSONDecodeError:
            if not raw or len(text) - at > _LINE:
                raise
            raw = stream.read(max(_PEEK, len(text) - at))
            text, at = text[at:] + utf8.decode(raw, final=not raw), 0
            continue
        at = stop
        yield value if isinstance(value, dict) else None


def _parquet_records(path: Path, choices: Sequence[set[str]]) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        there = [fields for fields in choices if fields <= set(names)]
        if not there:
            absent = min(choices[0] - set(names))
            raise InputError(f"{path} has no column {absent!r}, only {', '.join(names)}.")
        for field in set().union(*there) - {MESSAGES}:
            kind = file.schema_arrow.field(field).type
            if pyarrow.types.is_nested(kind):
                raise InputError(
                    f"{path} holds {kind} in its column {field!r}, not text: name a column of "
                    "strings, or write one out of the lists."
                )
        for batch in file.iter_batches(batch_size=64, columns=sorted(set().union(*there))):
            yield from batch.to_pylist()


def _txt_records(stream: io.BufferedIOBase, counts: Counter[str]) -> Iterator[Record]:
    """One document a file; a giant one in pieces, so that it is never in memory as a whole."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    text, invalid, giant, raw = "", False, False, b"more"
    while raw:
        raw = stream.read(GIANT)
        new = decoder.decode(raw, final=not raw)
        invalid |= new.count("\ufffd") > raw.count("\ufffd".encode())
        text += new
        if len(text) > GIANT:
            giant, cut = True, border(text)
            yield {"text": text[:cut]}
            text = text[cut:]
    counts.update(invalid=int(invalid), giant=int(giant))
    yield {"text": text}


def decoded(raw: bytes, counts: Counter[str]) -> str:
    """Text; what UTF-8 cannot hold becomes U+FFFD and is counted as `invalid`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        counts["invalid"] += 1
        return raw.decode(errors="replace")


def border(text: str) -> int:
    """Where to cut: after the last paragraph, line or word that ends in the second half."""
    if len(text) <= GIANT:
        return len(text)
    marks = ((text.rfind(mark, GIANT // 2, GIANT), len(mark)) for mark in ("\n\n", "\n", " "))
    return next((at + size for at, size in marks if at >= 0), GIANT)


def reason(error: BaseException) -> str:
    """What an error says, as a part of one sentence."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
