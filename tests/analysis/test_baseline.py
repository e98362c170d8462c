"""A run beside its baseline: numbers, words and what they cannot say."""

import json
import re

import pytest

from rho1_jax.analysis import baseline, report
from rho1_jax.errors import InputError

HEADER = "step,tokens,seconds,loss"


def make_run(folder, losses, *, tokens=4000, seed=0, curve="", said="", binding=None):
    folder.mkdir()
    (folder / "metrics.csv").write_text(f"{HEADER}\n1,{tokens},5,4\n")
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    policy = {d: {"loss": x, "bits_per_byte": x} for d, x in losses.items()}
    evals = {"policy": policy, "binding": binding or {}}
    if said:
        evals["selection"] = {"score": "excess", "said": said}
    (folder / "eval.json").write_text(json.dumps(evals))
    if curve:
        (folder / "heldout.csv").write_text(f"tokens,domain,loss\n{curve}")
    return folder


@pytest.fixture
def pair(tmp_path):
    def of(ours, theirs, mine=(), other=()):
        return (
            make_run(tmp_path / "slm", ours, **dict(mine)),
            make_run(tmp_path / "clm", theirs, **dict(other)),
        )

    return of


def test_differences_are_ours_minus_the_baselines(pair):
    found = baseline.compare(*pair({"a": 3.0, "b": 4.5, "c": 2.0}, {"a": 3.25, "b": 4.0, "c": 2}))
    assert [row.difference for row in found.rows] == ["−0.250", "+0.500", "0.000"]
    assert found.result == (
        "Its held-out loss is lower than the baseline's on a, and equal on c, and higher on b."
    )
    assert found.chart is None


def test_what_three_decimals_cannot_tell_is_equal(pair):
    found = baseline.compare(*pair({"a": 3.0004}, {"a": 3.0}))
    assert found.result == "Its held-out loss is equal to the baseline's on a."


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, "Both saw 4k training tokens; what a reference and scoring cost is not counted."),
        ({"tokens": 8000}, "Not at equal tokens: this run saw 4k, the baseline 8k;"),
        ({}, "One run of each (seed 0): how far another seed would move"),
        ({"seed": 3}, "One run of each (seeds 0 and 3): how far"),
    ],
)
def test_the_caveat_says_what_else_differs(pair, other, words):
    assert words in baseline.compare(*pair({"a": 3.0}, {"a": 4.0}, {}, other)).caveat


def test_other_text_is_not_compared(pair):
    ours, theirs = {"binding": {"a": "x", "b": "y"}}, {"binding": {"a": "x", "b": "z"}}
    found = baseline.compare(*pair({"a": 3.0, "b": 3.0, "c": 1}, {"a": 4.0, "b": 9}, ours, theirs))
    assert [row.domain for row in found.rows] == ["a"]
    assert "Not compared, for the baseline has no such text: b and c." in found.caveat


def test_nothing_in_common_is_one_sentence(pair):
    with pytest.raises(InputError, match="no held-out loss on the same text"):
        baseline.compare(*pair({"a": 3.0}, {"b": 4.0}))


def test_a_folder_that_is_no_run_is_named(pair, tmp_path):
    ours, _ = pair({"a": 3.0}, {"a": 3.0})
    with pytest.raises(InputError, match="elsewhere has no held-out loss"):
        baseline.compare(ours, tmp_path / "elsewhere")


def test_the_first_screen_shows_both(pair, assert_self_contained):
    curve = {"curve": "0,a,5\n4000,a,3\n"}
    ours, theirs = pair(
        {"a": 3.0}, {"a": 4.0}, curve | {"said": "some entered"}, curve | {"said": "<all> entered"}
    )
    page = report.write(ours, passages=[], histogram=None, compare=theirs).read_text()
    assert_self_contained(page)
    first = page[page.index("<main>") : page.index("<section>")]
    assert first.count("<svg") == 1
    assert "Held-out loss of this run and its baseline" in first
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", first)).replace("&#39;", "'")
    assert "Selective language modeling: some entered. Its held-out loss is lower than" in text
    assert "In the baseline, clm, &lt;all&gt; entered." in text
    assert "a 4.000 3.000 −1.000" in text
    assert text.index("One run of each") < text.index("steps 1")
    alone = report.write(ours, passages=[], histogram=None).read_text()
    assert "baseline" not in alone[alone.index("<main>") :]
