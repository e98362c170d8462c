"""The records of one file: JSON lines (plain, gzip, zstd), parquet, text; read in bounded pieces.

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
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
_LINE = 2**28  # bytes; a longer JSON line counts as malformed

Record = Mapping[str, Any]


def records(path: Path, choices: Sequence[set[str]], counts: Counter[str]) -> Iterator[Record]:
    """Streams the records of a file.

    choices: sets of fields of which one is needed; parquet files are read no further than that.
    counts: receives `malformed`, `invalid` and `giant`.

    Raises:
        InputError: the file is damaged, or a parquet file has none of the choices.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path, choices)
            return
        with _open(path) as stream:
            read = _txt_records if path.suffix == ".txt" else _json_records
            yield from read(stream, counts)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
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


def _json_records(stream: io.BufferedIOBase, counts: Counter[str]) -> Iterator[Record]:
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
        if isinstance(record, dict):
            yield record
        else:
            counts["malformed"] += 1


def _parquet_records(path: Path, choices: Sequence[set[str]]) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        there = [fields for fields in choices if fields <= set(names)]
        if not there:
            absent = min(choices[0] - set(names))
            raise InputError(f"{path} has no column {absent!r}, only {', '.join(names)}.")
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
