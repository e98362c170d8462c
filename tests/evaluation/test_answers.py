"""Final answers: found, compared, and re-graded."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from rho1_jax.errors import InputError
from rho1_jax.evaluation import answers
from rho1_jax.evaluation.answers import compare, extract, gold_answer

EQUAL = [
    # fractions
    (r"\frac{1}{2}", "1/2"), (r"\frac{1}{2}", "0.5"), (r"\frac12", r"\dfrac{1}{2}"),
    (r"1\frac{1}{2}", "3/2"), ("1 1/2", "1.5"), (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    ("1/3", "0.33333"),
    # radicals
    (r"\sqrt{12}", r"2\sqrt{3}"), (r"3\sqrt{13}", "3*sqrt(13)"), (r"\sqrt[3]{8}", "2"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), (r"2\sqrt{3}", "2√3"),
    # intervals, tuples, sets, matrices
    ("[0,1)", r"\left[0,1\right)"), (r"(-\infty, 3]", "(-oo, 3]"), ("[-2,7]", r"x \in [-2,7]"),
    (r"(1,2)\cup(3,4)", r"(3,4) \cup (1,2)"), (r"(3, \frac{\pi}{2})", "(3, pi/2)"),
    ("(1,2,3)", r"\left( 1, 2, 3 \right)"), ("1,-2", "-2, 1"), (r"\{1,2\}", "1 and 2"),
    ("2, 3", "x = 2 or x = 3"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    # percentages, units, money
    (r"50\%", "50"), (r"50\%", "0.5"), ("0.5", "50%"), (r"12.5\%", "1/8"), ("5 cm", "5"),
    ("5 cm", "0.05 m"), ("2 hours", "120 minutes"), (r"\$1,200", "1200 dollars"),
    ("9 (apples)", "9"), (r"15\mbox{ cm}^2", "15"), (r"90^\circ", "90 degrees"), ("18", "18.0"),
    # numbers in words and powers
    ("twenty-five", "25"), ("241", "two hundred and forty-one"), ("1,000,000", "one million"),
    ("3", "three apples"), ("10^{10}", "1e10"), (r"3 \times 10^5", "300000"),
    # choices and words
    ("B", "(B)"), ("B", "B) 12"), (r"\text{(C)}", "C"), ("Evelyn", r"\text{evelyn}"),
    # algebra
    ("(x+1)^2", "x^2+2x+1"), ("5", "x=5"), ("6+9i", "9i + 6"), ("f(x)=x^2", "x^2"),
    (r"x \le 5", "x<=5"), (r"\pi", "3.14159"), ("26000", "1000(26)"),
]  # fmt: skip

DIFFERENT = [
    ("1/2", "1/3"), ("1/3", "0.333"), (r"\sqrt{2}", "2"), ("[0,1)", "(0,1)"), ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"), ("(1,2,3)", "(1,2)"), ("1,-2", "1"), ("3", "3 or 4"), ("12", "1,2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ("5 cm", "5 m"), ("2 hours", "2 minutes"), ("50%", "5"), ("7500", "75"), ("42", "4200"),
    ("B", "C"), ("B", "2"), ("A", "Apple"), ("A", "An apple"), ("Evelyn", "Angela"),
    ("18", "-18"), ("18", "18.5"), ("2", "2x"), ("2x", "2"), ("twenty", "twelve"), ("x+1", "x+2"),
    (r"\infty", r"-\infty"), ("5", "Perhaps it is 5 or so"), ("72", "72. I hope it is correct"),
    (r"x \le 5", "x<5"), ("p-q", "q-p"), ("100000", "100011"), ("25", "two hundred"), ("", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold, answer):
    assert compare(gold, answer).correct


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not compare(gold, answer).correct


@pytest.mark.parametrize("giant", ["9" * 400 + ".5", "9" * 5000, "million " * 60, "1e999", "1/0"])
def test_giants_are_no_error(giant):
    assert not compare("5.0", giant).correct
    assert not compare(giant, "5.0").correct


def test_nothing_is_wrong():
    assert compare("5", None) == compare("5", " ") == (False, "no answer")


def test_what_sympy_cannot_finish_is_wrong_after_the_limit(monkeypatch):
    judge = answers.Judge(seconds=1.0)
    judge.equal("1", "1")  # has started
    monkeypatch.setattr(answers, "_judge", judge)
    start = time.monotonic()
    assert compare("1", "9^{9^{9^{9}}}") == (False, "timeout")
    assert time.monotonic() - start < 5.0
    assert compare(r"\sqrt{4}", "2").correct  # and goes on
    judge.close()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So $x = \boxed{\frac{1}{2}}$. Check.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{\text{\{2\}}}", r"\text{\{2\}}"),
        ("Final Answer: The final answer is $72$. I hope it is correct.", "72"),
        ("Final Answer: The final answer is 72. I hope it is correct.", "72"),
        ("The answer is 3.5 apples. That is many.", "3.5 apples"),
        ("5 + 6 = 11\n#### 11", "11"),
        ("The answer is 80 + 150 = 230 miles.", "230 miles"),
        ("The answer is $x=2$.", "x=2"),
        ("Answer: Let us think step by step.\nIt makes 3, then 7.", "7"),
        ("Answer: 12 red apples. Good.", "12 red apples"),
        ("The answer is 2x + 3y = 7.", "2x + 3y = 7"),
        (r"\boxed{3 + 4 = 7}", "3 + 4 = 7"),
        ("It makes 12, then 1,234.", "1,234"),
        ("```python\nprint(7)\n```\n```output\n7\n```\n", "7"),
        ("```output\n7\n```\nSo she has 8 left.", "8"),
        ("The answer is 4.\n\nQuestion: How many?\nAnswer: The answer is 9.", "4"),
        ("I do not know.", None),
        ("", None),
        (r"\boxed{", None),
        (r"The answer is \boxed{3", "3"),
    ],
)
def test_extract(text, found):
    assert extract(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 3.5 apples. That is many.", "3.5 apples. That is many"),
        ("The final answer is 72. I hope it is correct.", "72. I hope it is correct"),
        ("The final answer is $72$. I hope it is correct.", "72"),
        ("The answer is 80 + 150 = 230 miles.", "80 + 150 = 230 miles"),
    ],
)
def test_a_strict_reading_takes_the_whole_line(text, found):
    assert extract(text, strict=True) == found


def test_gold_answers():
    assert gold_answer("3 + 4 = <<3+4=7>>7\n#### 7") == "7"
    assert gold_answer(145.0) == "145"
    assert gold_answer(r"Hence $\boxed{p - q}.$") == "p - q"


def rows(*extra):
    row = {"idx": 4, "answer": "18", "code": ["The answer is 18.", "So 19."], "score": [True, True]}
    return "".join(json.dumps(row | more) + "\n" for more in ({}, *extra))


def test_regrade_reports_agreement_and_disagreements(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl.gz", tmp_path / "out.csv"
    with gzip.open(path, "wt") as f:
        f.write(rows({"score": None}))
    assert answers.main(["", str(path), f"--disagreements={out}"]) == 0
    assert "agreement 1/2 = 50.00%" in capsys.readouterr().out
    assert out.read_text().splitlines()[1:] == ["a.jsonl.gz,4/1,False,True,number"]


def test_regrade_takes_other_names_and_no_verdicts(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"completion": "#### 5", "target": 5.0}\n\n')
    assert answers.main(["", str(path)]) == 0
    assert "1 texts, correct: ours 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["not json\n", '{"answer": "5"}\n', '{"code": "5"}\n'])
def test_bad_rows_are_named(tmp_path, content, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(rows() + content)
    with pytest.raises(InputError, match="line 2"):
        list(answers.regrade(path))
    assert answers.main(["", str(path)]) == 2
    assert answers.main(["", str(tmp_path / "absent.jsonl")]) == 2
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
        graded = list(answers.regrade(path))
        assert sum(g.ours.correct == g.theirs for g in graded) >= agreement * len(graded), path
