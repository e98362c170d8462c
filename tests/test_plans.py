"""The plans: docs say what the CSV says, and the smallest is what the compiler says."""

import importlib.util
from pathlib import Path

import pytest

from experiments import csvfile, plans

ROOT = Path(__file__).parent.parent
ROWS = csvfile.read(ROOT / "experiments" / "plans.csv")


def test_docs_show_the_tables():
    text = (ROOT / "docs" / "scale.md").read_text()
    for table in plans.tables(ROWS):
        assert table in text


def test_rows_are_of_cases_and_fit():
    names = {case.name for case in plans.cases()}
    for row in ROWS:
        assert row["name"] in names or row["name"].startswith("MaxText")
        assert float(row["peak_gib"]) < float(row["memory_gib"])


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_smallest_plan_is_compiled_again():
    case = next(case for case in plans.cases() if case.name.startswith("tiny "))
    stored = next(row for row in ROWS if row["name"] == case.name)
    found = plans.row(case)
    assert found["arguments_gib"] == pytest.approx(float(stored["arguments_gib"]), rel=1e-3)
    same = found["versions"] == stored["versions"]
    for column in ("peak_gib", "mega_cycles"):  # other compilers may do better or worse
        rel = 1e-3 if same else 0.3
        assert found[column] == pytest.approx(float(stored[column]), rel=rel)
