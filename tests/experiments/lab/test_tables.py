"""Tables: published CSVs keep every cell, rows are replaced by key, Markdown is plain."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.lab import tables

PUBLISHED = [
    path
    for path in sorted((Path(__file__).parents[3] / "experiments").glob("*.csv"))
    if not path.read_text().startswith("#")  # a note: that table is written anew each time
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_rewriting_changes_no_cell(path, tmp_path):
    before = list(csv.reader(path.open()))
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    rows = tables.read(copy, dtype=str, keep_default_na=False)
    tables.replace(copy, rows[-1:], list(rows[-1]), columns=list(rows[-1]))
    assert list(csv.reader(copy.open())) == before


def test_what_is_written_is_what_was_measured(tmp_path):
    path = tmp_path / "a.csv"
    rows = [{"n": 3, "loss": np.float64(0.1), "said": 'a, "b"'}, {"loss": math.nan, "more": True}]
    tables.write(path, rows, note="jax 1")
    assert path.read_text() == '# jax 1\nn,loss,said,more\n3,0.1,"a, ""b""",\n,nan,,True\n'
    first, second = tables.read(path, comment="#")
    assert (first["n"], first["loss"], first["said"]) == (3, 0.1, 'a, "b"')
    assert math.isnan(second["n"])


def test_new_rows_take_the_place_of_those_of_their_key(tmp_path):
    path = tmp_path / "a.csv"
    tables.replace(
        path, [{"name": "x", "k": 1, "v": "1e-05"}, {"name": "y", "k": 1, "v": 2}], ["k"]
    )
    tables.write(path, [{"name": "x", "k": 1, "v": "1e-05"}, {"name": "y", "k": 1, "v": "2."}])
    new = {"name": "y", "k": 1, "v": 0.5, "w": 7}
    tables.replace(path, [new], ["name", "k"], order=lambda row: row["name"] != "y")
    assert path.read_text() == "name,k,v,w\ny,1,0.5,7\nx,1,1e-05,\n"


def test_markdown():
    assert tables.markdown(("a", ""), [("b", 1.5)]) == "| a |  |\n| --- | --- |\n| b | 1.5 |\n"
