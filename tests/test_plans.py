"""The plans: docs say what the CSV says, and the smallest is what the compiler says."""

import importlib.util
from pathlib import Path

import pytest

from experiments.lab import tables
from experiments.measure import plans, whole_runs

ROOT = Path(__file__).parent.parent
ROWS = tables.read(ROOT / "experiments" / "plans.csv")
AROUND = tables.read(ROOT / "experiments" / "whole_runs.csv")


def test_docs_show_the_tables():
    text = (ROOT / "docs" / "scale.md").read_text()
    for table in [*plans.summary(ROWS), whole_runs.table(AROUND, ROWS)]:
        assert table in text


def test_rows_are_of_cases_and_fit():
    names = {case.name for case in plans.cases()}
    for row in ROWS:
        assert row["name"] in names or row["name"].startswith("MaxText")
        assert row["peak_gib"] < row["memory_gib"]
    step = {row["name"]: row["peak_gib"] for row in ROWS}
    for row in AROUND:
        same = 1.01 * step[row["name"]]  # as docs/scale.md says
        assert row["peak_gib"] < (same if row["program"] == "reference" else step[row["name"]])


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_smallest_plan_is_compiled_again():
    case = next(case for case in plans.cases() if case.name.startswith("tiny "))
    stored = next(row for row in ROWS if row["name"] == case.name)
    found = plans.row(case)
    assert found["arguments_gib"] == pytest.approx(stored["arguments_gib"], rel=1e-3)
    same = found["versions"] == stored["versions"]
    for column in ("peak_gib", "mega_cycles"):  # other compilers may do better or worse
        rel = 1e-3 if same else 0.3
        assert found[column] == pytest.approx(stored[column], rel=rel)


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_smallest_whole_run_is_compiled_again():
    case = next(case for case in whole_runs.cases() if case.name == AROUND[0]["name"])
    stored = [row for row in AROUND if row["name"] == case.name]
    found = whole_runs.rows(case)
    assert [row["program"] for row in found] == [row["program"] for row in stored]
    for ours, theirs in zip(found, stored, strict=True):
        assert ours["beside_gib"] == pytest.approx(theirs["beside_gib"], rel=1e-3)
        rel = 1e-3 if ours["versions"] == theirs["versions"] else 0.3
        assert ours["peak_gib"] == pytest.approx(theirs["peak_gib"], rel=rel)
