"""A CSV whose rows are measured one by one: new ones take the place of older ones of their key."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def read(path: Path) -> list[dict[str, str]]:
    """Its rows."""
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def replace(
    path: Path,
    new: Sequence[Row],
    key: Sequence[str],
    *,
    columns: Sequence[str] = (),
    order: Callable[[Row], Any] = lambda _: 0,
) -> None:
    """The CSV with `new` in the place of the rows that have the same values of `key`.

    columns: all that any row has, unless given. order: what rows are sorted by; else new ones last.
    """

    def of(row: Row) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in key)

    taken = {of(row) for row in new}
    old = read(path) if path.exists() else []
    rows: list[Row] = sorted([*(r for r in old if of(r) not in taken), *new], key=order)
    with path.open("w", newline="") as f:
        names = list(columns) or list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(f, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
