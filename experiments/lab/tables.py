"""Tables: rows to CSV and to Markdown, whole or not at all, and back.

A CSV whose rows are measured one by one keeps them: new ones take the place of older ones of the
same key.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rho1_jax import files

Row = Mapping[str, Any]


def read(path: Path, **how: Any) -> list[dict[str, Any]]:
    """Its rows, numbers as numbers and empty cells as NaN. how: for pandas.read_csv."""
    rows: list[dict[str, Any]] = pd.read_csv(path, **how).to_dict("records")
    return rows


def write(path: Path, rows: Sequence[Row], *, columns: Sequence[str] = (), note: str = "") -> None:
    """A CSV of `rows`, cells that a row lacks empty. columns: all that any row has, unless given.

    note: a line before the header, after `# `.
    """
    names = list(columns) or list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in names] for row in rows]
    frame = pd.DataFrame(cells, columns=names, dtype=object)  # or whole numbers would get a point
    text = frame.to_csv(index=False, na_rep="nan", lineterminator="\n")
    files.write(path, f"# {note}\n{text}" if note else text)


def replace(
    path: Path,
    new: Sequence[Row],
    key: Sequence[str],
    *,
    columns: Sequence[str] = (),
    order: Callable[[Row], Any] = lambda _: 0,
) -> None:
    """The CSV with `new` in the place of the rows that have the same values of `key`.

    Older rows keep their cells as they are written. order: what rows are sorted by; else new ones
    come last.
    """

    def of(row: Row) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in key)

    taken = {of(row) for row in new}
    old = read(path, dtype=str, keep_default_na=False) if path.exists() else []
    rows: list[Row] = sorted([*(r for r in old if of(r) not in taken), *new], key=order)
    write(path, rows, columns=columns)


def markdown(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, with a line end after each row."""
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (head, rule, *lines))
