"""Reference scores kept on disk: computed once, bound to their rows and their reference.

A folder holds one float16 array [n_rows, S] per field, a bool array `done` [n_rows], and a
manifest that says what the scores belong to. Only the rows that training reads need scores; the
rest stays a hole in the file. A row counts as done only once its values are on the disk, so a run
that was killed resumes without trusting a value it never wrote.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax import jsonfile
from rho1_jax.errors import InputError

_DONE = "done"


class ScoreWriter:
    """Writes scores row by row; made by `create`."""

    def __init__(self, folder: Path, fields: Sequence[str]):
        self._columns = {field: _Column(_path(folder, field)) for field in fields}
        self._done = np.load(_path(folder, _DONE))
        self._done_column = _Column(_path(folder, _DONE))
        self._unflushed: list[np.ndarray] = []

    def missing(self, row_ids: np.ndarray) -> np.ndarray:
        """Those of `row_ids` that are not done yet, in the same order."""
        return row_ids[~self._done[row_ids]]

    def write(self, row_ids: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Stores values[field] [n, S] for the rows row_ids [n]; see `flush`.

        Raises:
            InputError: other fields, another shape, or a value that is not finite in float16.
        """
        if len(row_ids) and min(row_ids) < 0:
            raise InputError(f"Scores of row {min(row_ids)}: rows are numbered from 0.")
        if values.keys() != self._columns.keys():
            raise InputError(f"Scores need {sorted(self._columns)}, not {sorted(values)}.")
        for field, column in self._columns.items():
            block = values[field]
            if block.shape != (len(row_ids), *column.row_shape):
                raise InputError(
                    f"{field} {block.shape} is not one row of {column.row_shape[0]} for each of "
                    f"{len(row_ids)} row numbers."
                )
            with np.errstate(over="ignore"):
                small = block.astype(np.float16)
            if not np.isfinite(small).all():
                row = row_ids[np.argwhere(~np.isfinite(small))[0, 0]]
                raise InputError(
                    f"{field} of row {row} is not finite in float16: check the reference model."
                )
            column.write(row_ids, small)
        self._unflushed.append(row_ids)

    def flush(self) -> None:
        """Puts what was written on the disk, and only then marks it as done."""
        for column in self._columns.values():
            column.flush()
        for row_ids in self._unflushed:
            self._done[row_ids] = True
            self._done_column.write(row_ids, self._done[row_ids])
        self._done_column.flush()
        self._unflushed.clear()


class _Column:
    """One .npy file, written row by row.

    Not through a memory map: where the disk is full, filling a hole through a map kills the process
    (SIGBUS) instead of raising an error.
    """

    def __init__(self, path: Path):
        array = np.load(path, "r")
        assert isinstance(array, np.memmap)
        self.row_shape, self._dtype, self._start = array.shape[1:], array.dtype, array.offset
        self._stride = array.strides[0]
        self._file = path.open("r+b")

    def write(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        for row, values in zip(row_ids.tolist(), rows.astype(self._dtype), strict=True):
            self._file.seek(self._start + row * self._stride)
            self._file.write(values.tobytes())

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def create(
    folder: str | Path,
    *,
    n_rows: int,
    seq_len: int,
    fields: Sequence[str],
    binding: Mapping[str, str],
) -> ScoreWriter:
    """Begins a folder of scores, or goes on with the one that is there.

    binding: what the scores belong to, such as the fingerprints of rows and reference.

    Raises:
        InputError: the folder holds scores of another binding or shape.
    """
    folder = Path(folder)
    manifest: dict[str, Any] = {
        "n_rows": n_rows,
        "seq_len": seq_len,
        "fields": sorted(fields),
        "binding": dict(binding),
    }
    old = _read_manifest(folder)
    if old is None:
        _begin(folder, manifest)
        return ScoreWriter(folder, fields)
    _require_binding(folder, old["binding"], manifest["binding"])
    for key in ("n_rows", "seq_len", "fields"):
        if old[key] != manifest[key]:
            raise InputError(
                f"The scores in {folder} have {key} {old[key]}, not {manifest[key]}: "
                "delete the folder to score again."
            )
    return ScoreWriter(folder, fields)


def open_scores(
    folder: str | Path, *, fields: Sequence[str], row_ids: np.ndarray, binding: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Opens the scores of (at least) the rows row_ids, read-only, by field: float16 [n_rows, S].

    Raises:
        InputError: they are missing, unfinished, or belong to something else (it says what).
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise InputError(f"There are no scores in {folder}: run the stage 'score'.")
    _require_binding(folder, manifest["binding"], dict(binding))
    if not set(fields) <= set(manifest["fields"]):
        raise InputError(
            f"The scores in {folder} hold {manifest['fields']}, not {sorted(fields)}: "
            "delete the folder to score again."
        )
    n_done = int(np.load(_path(folder, _DONE), "r")[row_ids].sum())
    if n_done < len(row_ids):
        raise InputError(
            f"The scores in {folder} are unfinished ({n_done} of {len(row_ids)} rows): "
            "run the stage 'score' again."
        )
    return {field: np.load(_path(folder, field), "r") for field in fields}


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Empty arrays first, the manifest last: without it the folder does not count."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = manifest["n_rows"], manifest["seq_len"]
    for field in manifest["fields"]:
        np.lib.format.open_memmap(_path(folder, field), "w+", np.float16, shape).flush()
    np.save(_path(folder, _DONE), np.zeros(manifest["n_rows"], bool))
    jsonfile.write(folder / "manifest.json", manifest)


def _require_binding(folder: Path, theirs: dict[str, str], ours: dict[str, str]) -> None:
    other = sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key))
    if other:
        raise InputError(
            f"The scores in {folder} belong to other {' and '.join(other)}: "
            "delete the folder to score again."
        )


def _path(folder: Path, field: str) -> Path:
    return folder / f"{field}.npy"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    return jsonfile.read(path) if path.exists() else None
