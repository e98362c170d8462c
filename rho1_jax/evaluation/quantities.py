"""Numbers with units, as people and models write them: 1,200 · 3 1/2 · 40% · $12 · six cm."""

import math
import re
from fractions import Fraction
from typing import NamedTuple

RELATIVE = 1e-4  # two decimals this near are one number
_LONGEST = 500  # characters of a quantity

# unit -> (dimension, size in the dimension's first unit)
_UNITS = {
    "m": ("length", 1.0), "meter": ("length", 1.0), "metre": ("length", 1.0),
    "km": ("length", 1e3), "kilometer": ("length", 1e3), "cm": ("length", 1e-2),
    "centimeter": ("length", 1e-2), "mm": ("length", 1e-3), "millimeter": ("length", 1e-3),
    "mile": ("length", 1609.344), "yard": ("length", 0.9144), "inch": ("length", 0.0254),
    "foot": ("length", 0.3048), "feet": ("length", 0.3048), "ft": ("length", 0.3048),
    "g": ("mass", 1.0), "gram": ("mass", 1.0), "kg": ("mass", 1e3), "kilogram": ("mass", 1e3),
    "mg": ("mass", 1e-3), "ounce": ("mass", 28.349523125), "oz": ("mass", 28.349523125),
    "pound": ("mass", 453.59237), "lb": ("mass", 453.59237),
    "second": ("time", 1.0), "sec": ("time", 1.0), "minute": ("time", 60.0), "min": ("time", 60.0),
    "hour": ("time", 3600.0), "hr": ("time", 3600.0), "day": ("time", 86400.0),
    "week": ("time", 604800.0),
    "l": ("volume", 1.0), "liter": ("volume", 1.0), "litre": ("volume", 1.0),
    "ml": ("volume", 1e-3), "milliliter": ("volume", 1e-3), "gallon": ("volume", 3.785411784),
    "dollar": ("money", 1.0), "usd": ("money", 1.0), "cent": ("money", 0.01), "¢": ("money", 0.01),
    "degree": ("angle", 1.0), "radian": ("angle", 180.0 / math.pi),
    "%": ("share", 0.01), "percent": ("share", 0.01),
}  # fmt: skip

_DIGITS = r"(?:\d{1,3}(?:,(?:\\!)?\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL})\s*(?:[eE]([-+]?\d+)|(?:\\times|\\cdot|\*|x|×)\s*10\s*(?:\^|\*\*)\s*\{{?(-?\d+)\}}?)"
)
_LATEX_FRACTION = re.compile(
    rf"(\d+)?\s*\\[dt]?frac\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*({_DECIMAL})\s*\}}|(\d))"
)
_FRACTION = re.compile(rf"(?:(\d+)\s+)?({_DECIMAL})\s*/\s*({_DECIMAL})")
_PLAIN = re.compile(_DECIMAL)
_UNIT = re.compile(r"[A-Za-z%°¢€£ ,'()-]*(?:\^\{?[23]\}?)?[A-Za-z ]*")

_NAMES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: i for i, word in enumerate(_NAMES.split())}
_WORDS |= {word: 10 * i for i, word in enumerate(_TENS.split(), 2)}
_POWERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}


class Quantity(NamedTuple):
    value: Fraction
    exact: bool  # False: written with a decimal point
    unit: str  # "" where none is named


def parse(text: str) -> Quantity | None:
    """The quantity that `text` as a whole is, or None."""
    if len(text) > _LONGEST:
        return None
    text = _simple(text)
    sign = -1 if re.match(r"-(?!-)", text) else 1
    body = text.lstrip("+-").strip() if sign < 0 or text.startswith("+") else text
    money = body.startswith(("$", "€", "£"))
    found = _number(body.lstrip("$€£ "))
    if found is None:
        return None
    value, exact, rest = found
    if (
        not _UNIT.fullmatch(rest)
        or len(rest.split()) > 6
        or re.search(r"\b(?:and|or|to)\b|,\s*\S", rest)
    ):
        return None
    if not rest[:1].isspace() and len(rest) == 1 and rest.isalpha():
        return None  # 2x is algebra, not two of a unit
    unit = rest.strip(" ,()").lower().replace("°", "degree") or ("dollar" if money else "")
    return Quantity(sign * value, exact, unit)


def equal(a: Quantity, b: Quantity) -> bool:
    """Same value, in units that agree: 1 km is 1,000 m, 5 apples are 5, and 40% is 40 or 0.4."""
    kinds = _kind(a.unit), _kind(b.unit)
    if kinds[0] and kinds[1]:
        if kinds[0][0] != kinds[1][0]:
            return False
        same = kinds[0] == kinds[1]
        scale = (1.0, 1.0) if same else (kinds[0][1], kinds[1][1])
        return _near(a, b, *scale)
    if _near(a, b):
        return True
    percents = [1.0 if kind is None or kind[0] != "share" else 0.01 for kind in kinds]
    return percents != [1.0, 1.0] and not (a.unit and b.unit) and _near(a, b, *percents)


def _near(a: Quantity, b: Quantity, scale_a: float = 1.0, scale_b: float = 1.0) -> bool:
    if a.exact and b.exact and scale_a == scale_b:
        return a.value == b.value
    x, y = a.value * Fraction(scale_a), b.value * Fraction(scale_b)  # no float is too small
    return abs(x - y) <= max(Fraction(RELATIVE) * max(abs(x), abs(y)), Fraction(1, 10**9))


def _kind(unit: str) -> tuple[str, float] | None:
    return _UNITS.get(unit) or _UNITS.get(unit.removesuffix("s")) or _UNITS.get(unit[:-2])


def _simple(text: str) -> str:
    """LaTeX that only dresses a number, taken off."""
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,; ]|~", " ", text)
    text = text.replace(r"\!", "").replace(r"\$", "$").replace(r"\%", "%").replace("−", "-")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b|\\circ", " degree", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    return re.sub(r"\s+", " ", text).strip().removesuffix("$").strip()


def _number(text: str) -> tuple[Fraction, bool, str] | None:
    """(value, whether exact, what follows) of the number that `text` begins with."""
    if found := _SCIENTIFIC.match(text):
        power = int(found[2] or found[3])
        if abs(power) > 300:
            return None
        return _fraction(found[1]) * Fraction(10) ** power, False, text[found.end() :]
    if found := _LATEX_FRACTION.match(text):
        whole, top, bottom = found[1], found[2] or found[3], found[4] or found[5]
    elif found := _FRACTION.match(text):
        whole, top, bottom = found.groups()
    elif found := _PLAIN.match(text):
        return _fraction(found[0]), "." not in found[0], text[found.end() :]
    else:
        return _worded(text)
    if not _fraction(bottom):
        return None
    value = int(whole or 0) + _fraction(top) / _fraction(bottom)
    return value, "." not in found[0], text[found.end() :]


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace("\\!", "").rstrip(".") or "0")


def _worded(text: str) -> tuple[Fraction, bool, str] | None:
    """Numbers in words: "two hundred and forty-one apples"."""
    total = group = 0
    end = 0
    for word in re.finditer(r"[a-z]+", text.lower()):
        if word[0] in _WORDS:
            group += _WORDS[word[0]]
        elif word[0] in _POWERS and end:
            group *= _POWERS[word[0]]
            if word[0] != "hundred":
                total, group = total + group, 0
        elif word[0] != "and" or not end:
            break
        end = word.end() if word[0] != "and" else end
    return (Fraction(total + group), True, text[end:]) if end else None
