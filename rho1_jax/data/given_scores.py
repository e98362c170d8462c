"""Scores that somebody else computed: a Parquet file, or a folder of such.

Columns, those of rho1_jax.export_scores: `domain` and `row` say which packed row a line is of,
`input_ids` what its tokens are (S + 1), which must be ours, and lists of as many numbers the
reference's `ref_loss` in nats or `ref_logprob`, its negative, and where it is asked for its
`ref_entropy`. The first token's is not read, nor those of padding: nothing predicts it. Other
columns and rows that training does not read are passed over.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rho1_jax import files, jsonfile
from rho1_jax.data.loader import Rows
from rho1_jax.errors import InputError

_KEYS = ("domain", "row", "input_ids")
_READ_ROWS = 256
_ROUNDING = -0.01  # nats: a loss below is none


def require(source: str, fields: Sequence[str]) -> None:
    """InputError unless there are Parquet files at `source` with the columns that give `fields`."""
    for path in _files(source):
        _columns(path, fields)


def digest(source: str) -> str:
    """What tells the files at `source` from others', wherever they lie: of all their bytes."""
    return jsonfile.digest([files.sha256(path) for path in _files(source)])


def read(
    source: str, fields: Sequence[str], domain: str, rows: Rows, row_ids: np.ndarray
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields row numbers [n] and {field: float32 [n, S] for each of `fields`} until every row of
    row_ids came once, in the order of the files.

    Raises:
        InputError: a row has other tokens than ours, a value that is no score, or none at all.
    """
    left = set(row_ids.tolist())
    for path in _files(source):
        columns = _columns(path, fields)
        with pq.ParquetFile(path) as file:
            for table in file.iter_batches(_READ_ROWS, columns=[*_KEYS, *columns.values()]):
                found = _wanted(table, domain, left)
                if found.num_rows:
                    yield _checked(path, found, rows, columns)
    if left:
        raise InputError(
            f"{source} has no scores of {len(left):,} of the {len(row_ids):,} rows of {domain} "
            f"that training reads, such as row {min(left)}: export those rows and score them, too."
        )


def _files(source: str) -> list[Path]:
    place = Path(source)
    found = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not found or not found[0].is_file():
        raise InputError(
            f"score.source={source} is neither a Parquet file nor a folder that holds any: name "
            "what was written, or leave it empty to score here."
        )
    return found


def _columns(path: Path, fields: Sequence[str]) -> dict[str, str]:
    """The column of each field; InputError if one is missing."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as Parquet ({told}): write it again.") from error
    columns = {field: field for field in fields}
    if "ref_loss" in columns and "ref_loss" not in names and "ref_logprob" in names:
        columns["ref_loss"] = "ref_logprob"
    missing = [name for name in (*_KEYS, *columns.values()) if name not in names]
    if missing:
        has = ", ".join(names)
        raise InputError(f"{path} has no column {missing[0]}, only {has}: add it (docs/scores.md).")
    return columns


def _wanted(table: pa.RecordBatch, domain: str, left: set[int]) -> pa.RecordBatch:
    """The lines of rows in `left`, which are taken out of it."""
    names, numbers = table["domain"].to_pylist(), table["row"].to_pylist()
    taken = []
    for i, (name, number) in enumerate(zip(names, numbers, strict=True)):
        if name == domain and number in left:
            left.remove(number)
            taken.append(i)
    return table.take(pa.array(taken, pa.int64()))


def _checked(
    path: Path, table: pa.RecordBatch, rows: Rows, columns: dict[str, str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    numbers = table["row"].to_numpy()
    ours: list[dict[str, Any]] = rows.__getitems__(numbers.tolist())
    tokens = np.stack([row["tokens"] for row in ours])
    theirs = _matrix(path, table, "input_ids", numbers, tokens.shape[1])
    if (other := np.flatnonzero((theirs != tokens).any(axis=1))).size:
        raise InputError(
            f"{path} has other tokens in row {numbers[other[0]]} of {rows.name} than this run: "
            "score the rows that were packed here, with the same tokenizer."
        )
    real = np.arange(rows.seq_len) < np.array([row["length"] for row in ours])[:, None]
    found = {}
    for field, column in columns.items():
        values = _matrix(path, table, column, numbers, tokens.shape[1])[:, 1:].astype(np.float32)
        values = np.where(real, -values if column == "ref_logprob" else values, 0.0)
        wrong = np.argwhere(~np.isfinite(values) | (values < _ROUNDING))
        if wrong.size:
            row, place = wrong[0]
            raise InputError(
                f"{path} has no {field} for token {place + 1} of row {numbers[row]} of "
                f"{rows.name}: {column} makes it {values[row, place]:.6g}, and it must be a number "
                "of nats of 0 or more."
            )
        found[field] = values
    return numbers, found


def _matrix(
    path: Path, table: pa.RecordBatch, column: str, numbers: np.ndarray, width: int
) -> np.ndarray:
    lists = table[column].to_pylist()
    short = next((i for i, x in enumerate(lists) if x is None or len(x) != width), None)
    if short is not None:
        n = 0 if lists[short] is None else len(lists[short])
        raise InputError(
            f"{path} has {n} values of {column} in row {numbers[short]}, but rows have {width} "
            "tokens: give one for each, the first one included."
        )
    return np.array([[np.nan if x is None else x for x in each] for each in lists])
