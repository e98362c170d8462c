"""Released outputs, graded again."""

import gzip
import json
import os
from pathlib import Path

import pytest

from experiments.measure import regrade
from rho1_jax.errors import InputError


def rows(*extra):
    row = {"idx": 4, "answer": "18", "code": ["The answer is 18.", "So 19."], "score": [True, True]}
    return "".join(json.dumps(row | more) + "\n" for more in ({}, *extra))


def test_regrade_reports_agreement_and_disagreements(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl.gz", tmp_path / "out.csv"
    with gzip.open(path, "wt") as f:
        f.write(rows({"score": None}))
    assert regrade.main(["", str(path), f"--disagreements={out}"]) == 0
    assert "agreement 1/2 = 50.00%" in capsys.readouterr().out
    assert out.read_text().splitlines()[1:] == ["a.jsonl.gz,4/1,False,True,number"]


def test_regrade_takes_other_names_and_no_verdicts(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"completion": "#### 5", "target": 5.0}\n\n')
    assert regrade.main(["", str(path)]) == 0
    assert "1 texts, correct: ours 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["not json\n", '{"answer": "5"}\n', '{"code": "5"}\n'])
def test_bad_rows_are_named(tmp_path, content, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(rows() + content)
    with pytest.raises(InputError, match="line 2"):
        list(regrade.regrade(path))
    assert regrade.main(["", str(path)]) == 2
    assert regrade.main(["", str(tmp_path / "absent.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("pattern", "agreement"), [("*gsm8k.jsonl.gz", 0.995), ("*math.jsonl.gz", 0.99)]
)
def test_agreement_with_the_papers_own_verdicts(pattern, agreement):
    """The outputs the authors released, with their verdicts; see experiments/regrading.csv."""
    folder = Path(os.environ.get("RHO1_DATA", "absent"), "rho_released_outputs")
    files = sorted(folder.glob(pattern))
    if not files:
        pytest.skip("set RHO1_DATA to a folder with rho_released_outputs/")
    for path in files:
        graded = list(regrade.regrade(path))
        assert sum(g.ours.correct == g.theirs for g in graded) >= agreement * len(graded), path
