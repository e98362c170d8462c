"""Reference scores kept on disk: computed once, bound to their rows and their reference.

A folder holds one float16 array [n_rows, S] per field (wider where a token has several numbers, and
int32 of token ids), a uint32 array `checks` [n_rows, fields], and a manifest that says what the
scores belong to. Only the rows that training reads need scores; the rest stays a hole in the file.
A row is done once the CRC-32 of its values is in `checks` (0: it
is not), which is written after the values are on the disk. So a run that was killed resumes without
trusting a value it never wrote, and values that changed since are found, finished or not.
"""

import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax import jsonfile
from rho1_jax.errors import InputError

_log = logging.getLogger("rho1_jax")

_CHECKS = "checks"
_DTYPES = {_CHECKS: "<u4", "ref_top_ids": "<i4"}  # of a field: float16


class ScoreWriter:
    """Writes scores row by row; made by `create`."""

    def __init__(self, folder: Path, fields: Sequence[str]):
        self._columns = {field: _Column(_path(folder, field)) for field in sorted(fields)}
        self._done = (np.load(_path(folder, _CHECKS)) != 0).all(axis=1)
        self._checks = _Column(_path(folder, _CHECKS))
        self._unflushed: list[tuple[np.ndarray, np.ndarray]] = []

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
        checks = np.zeros((len(row_ids), len(self._columns)), np.uint32)
        for i, (field, column) in enumerate(self._columns.items()):
            block = values[field]
            if block.shape != (len(row_ids), *column.row_shape):
                raise InputError(
                    f"{field} {block.shape} is not one row of {column.row_shape[0]} for each of "
                    f"{len(row_ids)} row numbers."
                )
            with np.errstate(over="ignore"):
                small = block.astype(column.dtype)
            if not np.isfinite(small).all():
                row = row_ids[np.argwhere(~np.isfinite(small))[0, 0]]
                raise InputError(
                    f"{field} of row {row} is not finite in float16: check the reference model."
                )
            column.write(row_ids, small)
            checks[:, i] = [_check(row) for row in small]
        self._unflushed.append((row_ids, checks))

    def flush(self) -> None:
        """Puts what was written on the disk, and only then marks it as done."""
        for column in self._columns.values():
            column.flush()
        for row_ids, checks in self._unflushed:
            self._done[row_ids] = True
            self._checks.write(row_ids, checks)
        self._checks.flush()
        self._unflushed.clear()


class _Column:
    """One .npy file, written row by row.

    Not through a memory map: where the disk is full, filling a hole through a map kills the process
    (SIGBUS) instead of raising an error.
    """

    def __init__(self, path: Path):
        array = np.load(path, "r")
        assert isinstance(array, np.memmap)
        self.row_shape, self.dtype, self._start = array.shape[1:], array.dtype, array.offset
        self._stride = array.strides[0]
        self._file = path.open("r+b")

    def write(self, row_ids: np.ndarray, rows: np.ndarray) -> None:
        for row, values in zip(row_ids.tolist(), rows.astype(self.dtype), strict=True):
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
    widths: Mapping[str, int] | None = None,
) -> ScoreWriter:
    """Begins a folder of scores, or goes on with the one that is there.

    Rows that are damaged count as missing, and so does all where a file is damaged or gone as a
    whole; it says so.

    binding: what the scores belong to, such as the fingerprints of rows and reference.
    widths: numbers a token of fields with more than one; they are written as [n, S * width].

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
    if widths:
        manifest["widths"] = dict(widths)
    old = _read_manifest(folder)
    if old is None:
        _begin(folder, manifest)
        return ScoreWriter(folder, fields)
    _require_binding(folder, old["binding"], manifest["binding"])
    for key in ("n_rows", "seq_len", "fields", "widths"):
        if old.get(key) != manifest.get(key):
            raise InputError(
                f"The scores in {folder} have {key} {old.get(key)}, not {manifest.get(key)}: "
                "delete the folder to score again."
            )
    _forget_damage(folder, manifest)
    return ScoreWriter(folder, fields)


def open_scores(
    folder: str | Path, *, fields: Sequence[str], row_ids: np.ndarray, binding: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Opens the scores of (at least) the rows row_ids, read-only, by field: float16 [n_rows, S],
    or [n_rows, S, width].

    Every value of these rows is read once, to be checked.

    Raises:
        InputError: they are missing, unfinished, damaged, or belong to something else (it says
            what).
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
    arrays = _opened(folder, manifest)
    n_done = int((arrays[_CHECKS][row_ids] != 0).all(axis=1).sum())
    if n_done < len(row_ids):
        raise InputError(
            f"The scores in {folder} are unfinished ({n_done} of {len(row_ids)} rows): "
            "run the stage 'score' again."
        )
    for field in fields:
        bad = _damaged(arrays, manifest["fields"], field, row_ids)
        if bad.size:
            raise InputError(f"{_path(folder, field)} {_said(bad)}: run the stage 'score' again.")
    shape, wide = (manifest["n_rows"], manifest["seq_len"]), manifest.get("widths", {})
    return {
        field: arrays[field].reshape(*shape, *([wide[field]] if field in wide else []))
        for field in fields
    }


def verify(folder: str | Path) -> Iterator[tuple[Path, str | None]]:
    """(file, what is wrong with it or None) of a folder of scores, finished or not."""
    folder = Path(folder)
    try:
        manifest = jsonfile.read(folder / "manifest.json")
    except InputError as error:
        yield folder / "manifest.json", str(error)
        return
    yield folder / "manifest.json", None
    arrays = {name: _array(folder, manifest, name) for name in (*manifest["fields"], _CHECKS)}
    problems = {name: array for name, array in arrays.items() if isinstance(array, str)}
    whole = {name: array for name, array in arrays.items() if not isinstance(array, str)}
    for name in arrays:
        problem = problems.get(name)
        if name in whole and _CHECKS in whole and name != _CHECKS:
            bad = _damaged(whole, manifest["fields"], name, _done(whole))
            problem = _said(bad) if bad.size else None
        yield _path(folder, name), problem


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Empty arrays first, the manifest last: without it the folder does not count."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in (*manifest["fields"], _CHECKS):
        shape, dtype = _stored_as(manifest, name)
        np.lib.format.open_memmap(_path(folder, name), "w+", np.dtype(dtype), shape).flush()
    jsonfile.write_sealed(folder / "manifest.json", manifest)


def _forget_damage(folder: Path, manifest: dict[str, Any]) -> None:
    """Marks rows whose values are not what was written as not done."""
    fields = manifest["fields"]
    try:
        arrays = _opened(folder, manifest)
    except InputError as error:
        _log.warning("The scores in %s are begun anew (%s)", folder, error)
        return _begin(folder, manifest)
    found = [_damaged(arrays, fields, field, _done(arrays)) for field in fields]
    bad = np.unique(np.concatenate(found))
    if not bad.size:
        return None
    _log.warning("The scores in %s are damaged in %d rows: made anew", folder, bad.size)
    checks = _Column(_path(folder, _CHECKS))
    checks.write(bad, np.zeros((bad.size, len(fields)), np.uint32))
    return checks.flush()


def _opened(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of the folder, read-only; InputError unless they are as the manifest has them."""
    arrays = {}
    for name in (*manifest["fields"], _CHECKS):
        array = _array(folder, manifest, name)
        if isinstance(array, str):
            raise InputError(f"{_path(folder, name)} {array}: run the stage 'score' again.")
        arrays[name] = array
    return arrays


def _array(folder: Path, manifest: dict[str, Any], name: str) -> np.ndarray | str:
    """One array of the folder, read-only, or what is wrong with it."""
    try:
        array = np.load(_path(folder, name), "r")
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # a header is Python source: damaged, it raises anything
        return f"is damaged ({' '.join(str(error).split())})"
    shape, dtype = _stored_as(manifest, name)
    if array.shape != shape or array.dtype.str != dtype or not array.flags.c_contiguous:
        return f"is damaged ({array.dtype.str} {array.shape}, not {dtype} {shape})"
    return array


def _done(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The numbers of the rows that are done."""
    return np.flatnonzero((arrays[_CHECKS] != 0).all(axis=1))


def _stored_as(manifest: dict[str, Any], name: str) -> tuple[tuple[int, int], str]:
    each = manifest.get("widths", {}).get(name, 1)
    width = len(manifest["fields"]) if name == _CHECKS else each * manifest["seq_len"]
    return (manifest["n_rows"], width), _DTYPES.get(name, "<f2")


def _damaged(
    arrays: Mapping[str, np.ndarray], fields: Sequence[str], field: str, row_ids: np.ndarray
) -> np.ndarray:
    """Those of row_ids whose values are not what was written."""
    values, column = np.asarray(arrays[field]), sorted(fields).index(field)
    checks = np.fromiter((_check(values[row]) for row in row_ids.tolist()), "<u4", len(row_ids))
    return row_ids[checks != arrays[_CHECKS][row_ids, column]]


def _check(row: np.ndarray) -> int:
    """CRC-32, but never 0."""
    return zlib.crc32(row.data) or 1


def _said(bad: np.ndarray) -> str:
    return f"is damaged in {bad.size} rows, the first is {bad[0]}"


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
