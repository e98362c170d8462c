"""Numbers and their units, as people and models write them: 1,200 · 3 1/2 · 40% · $12 · six cm."""

import re
from fractions import Fraction
from typing import NamedTuple

RELATIVE = Fraction(1, 10**4)  # two decimals this near are one number
_NOISE = Fraction(1, 10**9)  # what floating point leaves of a zero
_LONGEST = 500  # characters of a quantity

# dimension -> names:size in the dimension's first unit. A name of one or two letters is a unit only
# if it stands here, behind a number, with a space or in \text{}: "2 t" and "8i" are algebra.
_DIMENSIONS = {
    "length": """m meter metre:1 km kilometer kilometre:1e3 cm centimeter centimetre:1e-2
        mm millimeter millimetre:1e-3 mile mi:1609.344 yard yd:0.9144 foot feet ft:0.3048
        inch in:0.0254""",
    "length^2": "acre:4046.8564224 hectare:1e4",
    "length^3": "l liter litre:1e-3 ml milliliter millilitre:1e-6 gallon gal:3.785411784e-3",
    "length per time": "mph:0.44704 kmh kph kmph:5/18",
    "mass": """g gm gram:1 kg kilogram:1e3 mg milligram:1e-3 ounce oz:28.349523125
        pound lb:453.59237""",
    "time": "second sec:1 minute min:60 hour hr:3600 day:86400 week:604800",
    "calendar": "month:1 year yr:12 decade:120 century centuries:1200",
    "money": "dollar usd buck:1 cent ¢ penny pennies:1e-2",
    "euros": "euro €:1",
    "angle": "degree deg:1 radian rad:57.29577951308232",
    "share": "% percent percentage:1e-2",
    "am": "am:1",
    "pm": "pm:1",
    "": "unit o'clock:1",  # says nothing
}
_MEASURES = {
    name: (dimension, Fraction(size))
    for dimension, line in _DIMENSIONS.items()
    for names, size in re.findall(r"([^:]+):(\S+)", line)
    for name in names.split()
}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_PER = {"h": "hour", "s": "second"}  # no units but in km/h and m/s
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound"}
# Counted are plurals and these; words of mathematics, or that change the number, are no unit.
_COUNTED = """people children men women feet geese mice teeth fish sheep deer total altogether left
more fewer each remaining"""
_NO_UNIT = """and or to not than is are as if plus minus less over mod choose pi theta alpha beta
gamma sin cos tan csc cot log ln exp sqrt abs factorial infinity tens hundreds thousands millions
billions dozens halves thirds fourths fifths sixths sevenths eighths ninths tenths hundredths
thousandths"""

_DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})+(?![\d,])|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?:(\d+) )?({_DECIMAL}) ?/ ?({_DECIMAL})|({_DECIMAL})")
_LATEX_FRACTION = re.compile(
    r"(?<![\^a-z])\\[dt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))"
)
_BASE = re.compile(r"(\d[0-9A-Fa-f]*) ?_ ?\{? ?(\d+) ?\}?")
_PREFIX = re.compile(r"([-+]?) ?([$€£]?) ?([-+]?) ?")
_MEASURED = re.compile(r"(.*(?:[\d})]|\\pi))( *\(? ?[A-Za-z%¢].*)")
_WORD = re.compile(r"[a-z%¢€][a-z'-]*")

_NAMES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: i for i, word in enumerate(_NAMES.split())}
_WORDS |= {word: 10 * i for i, word in enumerate(_TENS.split(), 2)}
_MULTIPLIERS = {"hundred": 100, "dozen": 12, "thousand": 10**3, "million": 10**6}
_MULTIPLIERS |= {"billion": 10**9, "trillion": 10**12}
_MULTIPLIED = re.compile(rf" ?({'|'.join(_MULTIPLIERS)})\b", re.I)


class Unit(NamedTuple):
    dimension: str  # "" where none is named, "things" for what is counted
    size: Fraction  # in the dimension's first unit


_ONE = Fraction(1)
_NONE, _THINGS = Unit("", _ONE), Unit("things", _ONE)


class Quantity(NamedTuple):
    text: str  # without the unit
    unit: Unit
    value: Fraction | None = None  # None: an expression, or no mathematics at all
    exact: bool = True  # False: written with a decimal point


def parse(text: str) -> Quantity:
    """The number that `text` as a whole is, or else an expression, with its unit."""
    if len(text) > _LONGEST:
        return Quantity(text, _NONE)
    simple = _simple(text)
    if base := _BASE.fullmatch(simple):
        value = Fraction(base[1]) if base[1].isdecimal() else None
        return Quantity(base[1], Unit(f"base {base[2]}", _ONE), value)
    number = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", simple).strip()
    prefix = _PREFIX.match(number)
    assert prefix is not None  # all of it is optional
    sign, currency = prefix[1] + prefix[3], prefix[2]
    if len(sign) < 2 and (found := _number(number[prefix.end() :])):
        value, exact, rest = found
        rest = rest.strip() and rest or currency and " " + _CURRENCIES[currency]
        if (unit := _unit(rest, one=value == 1)) is not None:
            return Quantity(simple, unit, -value if sign == "-" else value, exact)
    if measured := _MEASURED.fullmatch(simple):
        unit = _unit(measured[2])
        letter = len(measured[2].strip()) == 1  # of an expression
        if unit not in (None, _NONE, _THINGS) and not letter:
            return Quantity(measured[1], unit)
    return Quantity(text, _NONE)


def agree(a: Unit, b: Unit) -> bool:
    """Whether two units measure the same; one that only one side names is no difference."""
    return not (a.dimension and b.dimension) or a.dimension == b.dimension


def equal(a: Quantity, b: Quantity) -> bool:
    """Same value, in units that agree: 1 km is 1,000 m, 5 apples are 5, and 40% is 40 or 0.4."""
    if not agree(a.unit, b.unit):
        return False
    if a.unit.dimension and b.unit.dimension:
        return _near(a, b, a.unit.size, b.unit.size)
    if _near(a, b):
        return True
    sizes = [q.unit.size if q.unit.dimension == "share" else Fraction(1) for q in (a, b)]
    return sizes != [1, 1] and _near(a, b, *sizes)


def _near(a: Quantity, b: Quantity, size_a: Fraction = _ONE, size_b: Fraction = _ONE) -> bool:
    if a.value is None or b.value is None:
        return False
    x, y = (a.value, b.value) if size_a == size_b else (a.value * size_a, b.value * size_b)
    if a.exact and b.exact and size_a == size_b:
        return x == y
    return abs(x - y) <= (RELATIVE * max(abs(x), abs(y)) if x and y else _NOISE)


def _simple(text: str) -> str:
    """LaTeX that only dresses a number, taken off; words of \\text{} come out in parentheses."""
    text = re.sub(r"\\!\s*|\{(?=,\})|(?<=,)\}", "", text)  # 1{,}000
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;: ]|~", " ", text)
    text = text.replace(r"\$", "$").replace(r"\%", "%")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b|\\circ|°", " degree ", text)
    text = re.sub(r"(degree|degrees)\s+[CF]\b", r"\1", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|mathbf)\s*\{([^{}]*)\}", _marked, text)
    text = re.sub(r"(?<=\d):00(?=[ (]*[ap]\.?m)", "", text, flags=re.I)  # 9:00 a.m.
    return re.sub(r"\s+", " ", text).strip().removesuffix("$").strip()


def _marked(found: re.Match[str]) -> str:
    return f" ({found[1]})" if re.fullmatch(r"[^\d\\]*[A-Za-z%][^\d\\]*", found[1]) else found[1]


def _unit(text: str, one: bool = False) -> Unit | None:
    """The unit that all of `text` names; None if it is something else.

    one: a single thing, so that its name need not be a plural.
    """
    marked = "(" in text
    glued = text[:1] != " "
    text = re.sub(r"\^ ?\{? ?([23]) ?\}?", lambda m: (" squared", " cubed")[int(m[1]) - 2], text)
    text = re.sub(r"/ ?([hs])(?![a-z])", lambda m: f" per {_PER[m[1]]}", text.lower())
    words = re.sub("[().]", "", text).replace("/", " per ").split()
    if not words:
        return _NONE
    if (
        len(words) > 6
        or not set(words).isdisjoint(_NO_UNIT.split())
        or not all(map(_WORD.fullmatch, words))
    ):
        return None
    if glued and len(words[0]) == 1 and words[0].isalpha():
        return None  # 2m is algebra
    sides = [side.split() for side in " ".join(words).split(" per ")]
    units = [_measured(side) or _counted(side, marked or one) for side in sides]
    named = [unit for unit in units if unit is not None]
    if len(named) < len(units) or len(units) > 2:
        return None
    top, *per = named
    if not per:
        return top
    return Unit(f"{top.dimension} per {per[0].dimension}", top.size / per[0].size)


def _measured(words: list[str]) -> Unit | None:
    """The first measure that is named: square inches, feet of rope, US dollars."""
    power = next((_POWERS[word] for word in words if word in _POWERS), 1)
    names = [word for word in words if word not in _POWERS]
    for name in names if len(names) == 1 else [name for name in names if len(name) > 2]:
        for singular in (name, name.removesuffix("s"), name.removesuffix("es")):
            if singular in _MEASURES and (len(singular) > 1 or singular == name):
                dimension, size = _MEASURES[singular]
                return Unit(dimension + f"^{power}" * (power > 1 and dimension != ""), size**power)
    return None


def _counted(words: list[str], any_noun: bool) -> Unit | None:
    """Things, if words name some: a plural, or `any_noun` of more than a letter."""
    if any(len(word) == 1 and word != "a" for word in words):
        return None
    plural = any(w in _COUNTED.split() or re.fullmatch("[a-z'-]{3,}(?<![isu])s", w) for w in words)
    return _THINGS if any_noun or plural else None


def _number(text: str) -> tuple[Fraction, bool, str] | None:
    """(value, whether exact, what follows) of the number that `text` begins with."""
    if not (found := _NUMBER.match(text)):
        return _worded(text)
    whole, top, bottom, plain = found.groups()
    if plain is None and not _fraction(bottom):
        return None
    value = _fraction(plain) if plain else int(whole or 0) + _fraction(top) / _fraction(bottom)
    rest = text[found.end() :]
    while multiplied := _MULTIPLIED.match(rest):
        value, rest = value * _MULTIPLIERS[multiplied[1].lower()], rest[multiplied.end() :]
    return value, "." not in found[0], rest


def _fraction(digits: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", digits))


def _worded(text: str) -> tuple[Fraction, bool, str] | None:
    """Numbers in words: "two hundred and forty-one apples"."""
    total = group = end = 0
    for word in re.finditer(r"[a-z]+", text.lower()):
        if word[0] in _WORDS:
            group += _WORDS[word[0]]
        elif word[0] in _MULTIPLIERS and end:
            group *= _MULTIPLIERS[word[0]]
            if word[0] != "hundred":
                total, group = total + group, 0
        elif word[0] != "and" or not end:
            break
        end = word.end() if word[0] != "and" else end
    return (Fraction(total + group), True, text[end:]) if end else None
