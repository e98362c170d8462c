"""Tags of characters and tokens, by hand."""

import numpy as np
import pytest

from rho1_jax.data import taggers

TEXT = r"Let $x_1 = 2$ be. Ann has 3.5 apples, \frac{1}{2} of np.sqrt(4) `a b`; don't!"


@pytest.mark.parametrize(
    ("part", "tag"),
    [
        ("Let", "name"), ("$x_1 = 2$", "latex"), ("be", "word"), (".", "punctuation"),
        ("Ann", "name"), ("3.5", "number"), ("apples", "word"), (",", "punctuation"),
        (r"\frac{1}{2}", "latex"), ("np.sqrt", "code"), ("(", "punctuation"), ("4", "number"),
        ("`a b`", "code"), (";", "code"), ("don't", "word"), ("!", "punctuation"),
    ],
)  # fmt: skip
def test_characters(part, tag):
    start = TEXT.index(part)
    tags = taggers.by_pattern(TEXT)[start : start + len(part)]
    assert {taggers.TAGS[i] for i in tags} == {tag}


def test_a_tokens_tag_is_that_of_its_first_character():
    pieces = ["Sum", " 1", "23", "\n", "", " $", "y", "$"]
    named = [taggers.TAGS[i] for i in taggers.of_pieces(pieces)]
    assert named == ["name", "number", "number", "space", "space", "latex", "latex", "latex"]


def test_any_tagger_will_do():
    def vowels(text):
        return np.array([c in "aeiou" for c in text], np.int8)

    class Letters:
        def pieces(self, ids):
            return [chr(i) for i in ids]

    rows = np.array([[ord(c) for c in "abe"], [ord(c) for c in "xyz"]])
    np.testing.assert_array_equal(taggers.of_rows(rows, Letters(), vowels), [[0, 1], [0, 0]])
