"""Numbers and their units: whole words of a list, never the letters of an expression."""

from fractions import Fraction

import pytest

from rho1_jax.evaluation.quantities import agree, equal, parse

SAME = [
    ("3 gal", "3 gallons"), ("3 gallons", "3"), ("1 gal", "3.785411784 l"), ("12 inches", "1 foot"),
    ("5 ft", "60 in"), ("5cm", "5 cm"), ("5 km", "5000 m"), (r"0.25\,\text{ cm}", "2.5 mm"),
    ("440 cm^2", r"440\text{ square centimeters}"), ("1 m^2", "10000 cm^2"), ("1 l", "1000 cm^3"),
    ("60 mph", "60 miles per hour"), ("36 km/h", "36 kilometers per hour"), ("5 m/s", "18 km/h"),
    ("5 years", "60 months"), (r"90^\circ", r"90\text{ degrees}"),
    ("20 degrees C", r"20^\circ"), ("$3", "300 cents"),
    ("$5 million", "5000000 dollars"), ("5 million", "5,000,000"), ("3 dozen", "36"),
    ("three dozen eggs", "36 eggs"), ("50%", "50 percent"), ("50%", "0.5"), ("50%", "50"),
    ("5 men", "5"), ("5 bags", "5"), ("5 bags of rice", "5 (bags)"), ("1 apple", "1"),
    ("2 (CDs)", "2"), ("7 red apples", "7"), ("18\\text{ ways.}", "18"), ("12 units", "12 cm"),
    ("9 a.m.", "9:00 AM"), ("9 AM", "9"), ("101_2", "101_{2}"), ("101_2", "101"),
    ("247 US dollars", "$247"), ("-$5", "-5"), ("1 000 000", "1,000,000"),
    ("0", "0.0"), ("3 inches of snow", "3 in"),
]  # fmt: skip

NOT_SAME = [
    ("3 gal", "3 g"), ("3 gal", "3 grams"), ("5 men", "5 m"), ("5 men", "5 hours"),
    ("5 mph", "5 m"),
    ("5 mph", "5 miles"), ("5 gmt", "5 g"), ("5 cm", "5 cm^2"), ("5 cm^2", "5 m^2"),
    ("5 ms", "5 m"),
    ("2 g", "2 l"), ("9 AM", "9 PM"), ("101_2", "101_3"), ("101_2", "5"), ("5 million", "5"),
    ("3 dozen", "3"), ("5 thousand", "5"), ("5 dollars", "5 cents"), ("5 dollars", "5 euros"),
    ("50%", "50 apples"), ("3 hours", "3 minutes"), ("1 year", "1 month"), ("1e-10", "2e-10"),
]  # fmt: skip

NO_QUANTITY = [
    "3x^2", "8-i", "8i", "1 - x", "2pi", "2 pi", "2^3", "2t", "2 t", "2m", "9(x)", "9(m)", "5 h t",
    "6 xyz", "3 abc", "2 sin x", "2 cos", "5 mod n", "5 choose 2", "3 tenths", "5 and 6",
    "3!", "1/0",
    "5 less", "12, 13", "x_2", "5 or so", "2 hours 30 minutes", "", "-", "--5", "9" * 600,
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME)
def test_the_same(a, b):
    assert equal(parse(a), parse(b))
    assert equal(parse(b), parse(a))


@pytest.mark.parametrize(("a", "b"), NOT_SAME)
def test_not_the_same(a, b):
    assert not equal(parse(a), parse(b))
    assert not equal(parse(b), parse(a))


@pytest.mark.parametrize("text", NO_QUANTITY)
def test_no_quantity(text):
    assert parse(text).value is None


@pytest.mark.parametrize(
    ("text", "rest", "dimension"),
    [
        (r"8\sqrt{3} \text { square inches}", r"8\sqrt{3}", "length^2"),
        (r"99\pi\text{ cm}", r"99\pi", "length"),
        (r"\frac{3}{4}\pi\text{ inches}", r"\frac{3}{4}\pi", "length"),
        (r"\text{4:30 p.m.}", "4:30", "pm"),
        (r"2\sqrt{3} m", r"2\sqrt{3} m", ""),
        ("x min", "x min", ""),
    ],
)
def test_the_unit_of_an_expression(text, rest, dimension):
    assert parse(text)[:2] == (rest, parse(text).unit)
    assert parse(text).unit.dimension == dimension


def test_values():
    assert parse(r"1\frac{1}{2} hours").value == Fraction(3, 2)
    assert parse("two hundred and forty-one").value == 241
    assert agree(parse("5 cm").unit, parse("5").unit)
