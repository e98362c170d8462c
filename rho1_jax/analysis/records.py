"""What a run's folder says of it: metrics.csv, heldout.csv and JSON files, read and checked."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax.errors import InputError

SUBSETS = {"all": "", "selected": "_selected", "unselected": "_unselected"}
METRICS = ("step", "tokens", "seconds", "selected_share") + tuple(
    f"{model}loss{suffix}" for model in ("", "ref_") for suffix in SUBSETS.values()
)
MODELS = ("initial", "reference", "policy")


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as float64 [steps], NaN where a cell is empty."""
    if not path.exists():
        raise InputError(f"{path} does not exist: run the train stage, then the report.")
    rows = _read_csv(path, ("step", "tokens", "loss"))
    columns = {name: np.array([_number(path, row, name) for row in rows]) for name in METRICS}
    for name in ("step", "tokens"):
        missing = np.flatnonzero(~np.isfinite(columns[name]))
        if missing.size:
            raise InputError(_broken(path, rows[missing[0]], f"{name} is not a number"))
    return columns


def read_heldout(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per domain (tokens seen, loss in nats per token) of heldout.csv; {} if it is absent."""
    if not path.exists():
        return {}
    rows = _read_csv(path, ("tokens", "domain", "loss"))
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = _number(path, row, "tokens"), _number(path, row, "loss")
        points.setdefault(row["domain"], []).append(point)
    return {domain: (np.array(p)[:, 0], np.array(p)[:, 1]) for domain, p in points.items()}


def read_eval(path: Path) -> dict[str, Any]:
    """eval.json, {} if it is absent; InputError if a number that the report shows is missing."""
    evals = read_json(path)
    needed = dict.fromkeys(MODELS, ("loss", "bits_per_byte"))
    for section, keys in (needed | {"precision": ("precision", "useful_share")}).items():
        for name, values in evals.get(section, {}).items():
            for key in keys:
                if not isinstance(values.get(key), int | float):
                    where = f"{section}.{name}.{key}"
                    raise InputError(f"{path} has no number {where}: evaluate the run again.")
    return evals


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if it is absent; InputError if it holds none."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a JSON object ({error}): run its stage again.") from None


def _read_csv(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [row | {"": str(reader.line_num)} for row in reader]  # "": for messages
            header = reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file ({error}): run its stage again.") from None
    lacking = [name for name in required if name not in header]
    if lacking:
        raise InputError(f"{path} has no column {', '.join(lacking)}: run its stage again.")
    if not rows:
        raise InputError(f"{path} holds no rows: run its stage again.")
    for row in rows:
        if None in row or None in row.values():
            raise InputError(_broken(path, row, "the number of cells is not that of the header"))
    return rows


def _number(path: Path, row: Mapping[str, str], name: str) -> float:
    cell = row.get(name, "").strip()
    try:
        return float(cell) if cell else float("nan")
    except ValueError:
        raise InputError(_broken(path, row, f"{name} is {cell!r}, not a number")) from None


def _broken(path: Path, row: Mapping[str, str], what: str) -> str:
    return f"{path}, line {row['']}: {what}; remove the line or run its stage again."
