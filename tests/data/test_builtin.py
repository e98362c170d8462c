"""The embedded corpus: right answers, true spans, the same text every time."""

import itertools
import math
import random
import re
from collections import Counter

import pytest
import sympy
from sympy.parsing.sympy_parser import (
    implicit_multiplication_application,
    parse_expr,
    standard_transformations,
)

from rho1_jax.data import builtin
from rho1_jax.errors import InputError

X = sympy.Symbol("x")


def expression(text):
    rules = (*standard_transformations, implicit_multiplication_application)
    return parse_expr(text.replace("^", "**"), transformations=rules, local_dict={"x": X})


def numbers(text):
    return [int(n) for n in re.findall(r"-?\d+", text)]


def solved(kind, question):
    """The answer of a question, by another route than the generator's."""
    n = numbers(question)
    match kind:
        case "shopping":
            return f"${n[4] - sum(sympy.Matrix([n[0], n[2]]).T * sympy.Matrix([n[1], n[3]]))}"
        case "journey":
            hours, speeds = (n[0], n[2]), (n[1], n[3])
            average = sympy.integrate(speeds[0], (X, 0, hours[0]))
            average += sympy.integrate(speeds[1], (X, 0, hours[1]))
            return f"{sympy.Rational(average, sum(hours))} km/h"
        case "linear":
            left, right = re.search(r"(?:x:|if|from) (.+) = (.+)\.", question).groups()
            return f"x = {sympy.solve(sympy.Eq(expression(left), expression(right)), X)[0]}"
        case "quadratic":
            left = re.search(r"(?:Solve|of) (.+) = 0", question).group(1)
            roots = sorted(sympy.roots(expression(left), X))
            return " or ".join(f"x = {root}" for root in roots)
        case "fractions":
            a, sign, b = re.search(r"(\d+/\d+) ([+-]) (\d+/\d+)", question).groups()
            return str(sympy.Rational(a) + (1 if sign == "+" else -1) * sympy.Rational(b))
        case "percentage":
            price, off, tax = n
            paid = sympy.Integer(price) * (1 - sympy.Rational(off, 100))
            paid *= 1 + sympy.Rational(tax, 100)
            return f"${paid.evalf(20):.2f}"
        case "derivative":
            body = re.search(r"f\(x\) = (.+?)\. ", question).group(1)
            return str(sympy.diff(expression(body), X).subs(X, n[-1]))
        case "divisors":
            return f"gcd = {sympy.gcd(*n)}, lcm = {sympy.lcm(*n)}"
        case "sequence":
            k = sympy.Symbol("k")
            return str(sympy.summation(n[0] + (n[1] - n[0]) * k, (k, 0, n[3] - 1)))
        case "triangle":
            corners = sympy.Point(0, 0), sympy.Point(n[0], 0), sympy.Point(0, n[1])
            shape = sympy.Polygon(*corners)
            return f"perimeter {shape.perimeter} cm, area {abs(shape.area)} square cm"
        case "remainder":
            return str(n[0] ** n[1] % n[2])
        case "urn":
            return str(sympy.Rational(math.comb(n[0], 2), math.comb(n[0] + n[1], 2)))
    raise AssertionError(kind)


def sums(step):
    """The pairs of sides of the equations between plain numbers in a step."""
    sides = [side.strip(" .,") for side in re.split(r"=|: |, | so | is | km| dollars", step + " ")]
    plain = re.compile(r"[-(\d][-\d./*+() ]*")
    for left, right in itertools.pairwise(sides):
        whole = all(plain.fullmatch(t) and t.count("(") == t.count(")") for t in (left, right))
        if whole and f"{left} = {right}" in step:
            yield left, right


def test_answers_and_steps_are_right():
    kinds, checked = Counter(), 0
    for i in range(400):
        kind, question, steps, answer = builtin.problem(random.Random(f"test/{i}"))
        assert solved(kind, question) == answer, question
        kinds[kind] += 1
        for step in steps:
            for left, right in sums(step):
                assert sympy.sympify(left, rational=True) == sympy.sympify(right, rational=True), (
                    step
                )
                checked += 1
    assert checked > 500
    assert len(kinds) == len(builtin._KINDS)
    assert min(kinds.values()) > 15


def test_problems_are_useful_throughout_and_mostly_distinct():
    documents = list(builtin.documents("problems"))
    assert len(documents) == builtin.N_PROBLEMS
    assert all(spans == ((0, len(text)),) for text, spans in documents)
    assert len({text for text, _ in documents}) > 0.95 * len(documents)


@pytest.fixture(scope="module")
def pages():
    return list(builtin.documents("pages"))


def test_spans_of_pages_are_the_worked_problems(pages):
    """Found again in the text by the lines and phrases that only worked problems have."""
    mark = re.compile(r"^(Problem\. |Question: |Q\. |Exercise\. )", re.MULTILINE)
    for text, spans in pages:
        inside = [text[start:stop] for start, stop in spans]
        assert all(mark.match(part) and len(mark.findall(part)) == 1 for part in inside)
        assert all(part == part.strip() for part in inside)
        starts = [match.start() for match in mark.finditer(text)]
        assert {start for start, _ in spans} <= set(starts)
    assert sum(not spans for _, spans in pages) > 100  # pages with nothing to learn


def test_most_of_the_pages_is_noise(pages):
    useful = sum(stop - start for _, spans in pages for start, stop in spans)
    assert 0.25 < useful / sum(len(text) for text, _ in pages) < 0.40


def test_pages_hold_other_problems_than_the_clean_corpus(pages):
    clean = {text for text, _ in builtin.documents("problems")}
    found = [text[start:stop] for text, spans in pages for start, stop in spans]
    assert sum(text in clean for text in found) < 0.03 * len(found)


def test_the_same_text_every_time(pages, monkeypatch):
    first = [text for text, _ in builtin.documents("problems")]
    assert first == [text for text, _ in builtin.documents("problems")]
    assert pages[:100] == list(itertools.islice(builtin.documents("pages"), 100))

    prints = {name: builtin.fingerprint(name) for name in ("problems", "pages")}
    assert prints == {name: builtin.fingerprint(name) for name in prints}
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0")
    assert builtin.fingerprint("problems") == prints["problems"]
    assert builtin.fingerprint("pages") != prints["pages"]


def test_unknown_name():
    with pytest.raises(InputError, match="no embedded corpus 'poems'"):
        list(builtin.documents("poems"))
    with pytest.raises(InputError, match="no embedded corpus 'poems'"):
        builtin.fingerprint("poems")
