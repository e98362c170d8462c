"""The embedded corpus: text for a first run with no network, and with the truth about every token.

`problems` is clean: worked mathematics problems, written by a seeded generator. `pages` is noisy:
pages in which such problems (from other seeds) lie buried among navigation lines, markup, logs,
encoded junk and real technical prose, the docstrings of the installed numpy, scipy, sympy and jax.
Each document says which of its characters are useful: the worked problems, and nothing else.
"""

import ast
import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import random
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from rho1_jax.errors import InputError

N_PROBLEMS = 5000
N_PAGES = 1500
_PACKAGES = ("numpy", "scipy", "sympy", "jax")
_PROSE = 600_000  # characters of docstrings taken from each package

Spans = tuple[tuple[int, int], ...]


def documents(name: str) -> Iterator[tuple[str, Spans]]:
    """Yields (text, useful character spans) of the corpus `problems` or `pages`."""
    _require_known(name)
    if name == "pages":
        yield from _pages()
        return
    for i in range(N_PROBLEMS):
        text = worked(random.Random(f"problems/{i}"))
        yield text, ((0, len(text)),)


def fingerprint(name: str) -> str:
    """sha256 hex of all that the text follows from: this file, Python, the packages quoted."""
    _require_known(name)
    packages = _PACKAGES if name == "pages" else ()
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    parts = [name, f"python {sys.version_info[:2]}", *versions, Path(__file__).read_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _require_known(name: str) -> None:
    if name not in ("problems", "pages"):
        raise InputError(f"There is no embedded corpus {name!r}: use 'problems' or 'pages'.")


# Worked problems: each maker returns a question, the steps of its solution, and the answer,
# one on each line.


class Problem(NamedTuple):
    kind: str
    question: str
    steps: list[str]
    answer: str


def problem(rng: random.Random) -> Problem:
    """A problem of a kind drawn uniformly."""
    make = rng.choice(_KINDS)
    question, *steps, answer = (" ".join(line.split()) for line in make(rng).split("\n"))
    return Problem(make.__name__.strip("_"), question, steps, answer)


def worked(rng: random.Random) -> str:
    """A problem with its solution, in one of several layouts."""
    _, question, steps, answer = problem(rng)
    layout, prose = rng.randrange(5), " ".join(steps)
    if layout == 0:
        return f"Problem. {question}\n\nSolution. {prose}\n\nAnswer: {answer}"
    if layout == 1:
        return f"Question: {question}\nAnswer: {prose} The answer is {answer}."
    if layout == 2:
        return f"Q. {question}\nA. {prose}\n#### {answer}"
    name, end = ("Step ", "Therefore the answer is") if layout == 3 else ("", "Final answer:")
    lines = "\n".join(f"{name}{i}. {step}" for i, step in enumerate(steps, 1))
    return f"Exercise. {question}\n{lines}\n{end} {answer}."


def _shopping(rng: random.Random) -> str:
    (n, m), (p, q) = rng.choices(range(2, 13), k=2), rng.choices(range(2, 31), k=2)
    who, (this, that) = rng.choice(_NAMES), rng.sample(_THINGS, 2)
    total = n * p + m * q
    paid = total // 50 * 50 + 50
    ask = rng.choice([f"How much change does {who} get?", f"Find the change {who} receives."])
    return f"""{who} buys {n} {this} at ${p} each and {m} {that} at ${q} each. {who} pays \
        ${paid}. {ask}
        The {this} cost {n} * {p} = {n * p} dollars.
        The {that} cost {m} * {q} = {m * q} dollars.
        Together that is {n * p} + {m * q} = {total} dollars.
        The change is {paid} - {total} = {paid - total} dollars.
        ${paid - total}"""


def _journey(rng: random.Random) -> str:
    (v, w), (t, u) = rng.choices(range(15, 61, 5), k=2), rng.choices(range(2, 7), k=2)
    who = rng.choice(["train", "cyclist", "bus", "lorry", "boat"])
    length, mean = v * t + w * u, Fraction(v * t + w * u, t + u)
    return f"""A {who} travels for {t} hours at {v} km/h and then for {u} hours at {w} km/h. \
        What is its average speed over the whole journey?
        The first part is {t} * {v} = {t * v} km long, the second {u} * {w} = {u * w} km.
        The whole way is {t * v} + {u * w} = {length} km, and it takes {t} + {u} = {t + u} hours.
        Average speed is distance over time: {length} / {t + u} = {mean} km/h.
        {mean} km/h"""


def _linear(rng: random.Random) -> str:
    x, a, b, c = rng.randint(-12, 12), rng.randint(10, 20), rng.randint(-20, 20), rng.randint(-9, 9)
    d = a * x + b - c * x
    ask = rng.choice(["Solve for x:", "Find x if", "Determine x from"])
    return f"""{ask} {_poly(b, a)} = {_poly(d, c)}.
        Collect the terms with x on the left: ({a} - ({c}))x = {d} - ({b}).
        This is {_poly(0, a - c)} = {d - b}.
        Divide by {a - c}: x = {x}.
        x = {x}"""


def _quadratic(rng: random.Random) -> str:
    r, s = sorted(rng.choices(range(-20, 21), k=2))
    ask = rng.choice(["Solve", "Find all real solutions of", "Find the roots of"])
    return f"""{ask} {_poly(r * s, -r - s, 1)} = 0.
        The discriminant is ({-r - s})^2 - 4 * ({r * s}) = {(r - s) ** 2}, whose root is {s - r}.
        The smaller solution is ({r + s} - {s - r}) / 2 = {r}.
        The larger solution is ({r + s} + {s - r}) / 2 = {s}.
        {f"x = {r}" if r == s else f"x = {r} or x = {s}"}"""


def _fractions(rng: random.Random) -> str:
    b, d = rng.choices(range(2, 16), k=2)
    a, c, sign = rng.randint(1, 2 * b), rng.randint(1, 2 * d), rng.choice([1, -1])
    common, op = math.lcm(b, d), "+" if sign == 1 else "-"
    left, right = a * common // b, c * common // d
    top = left + sign * right
    return f"""{rng.choice(["Compute", "Simplify", "Evaluate"])} {a}/{b} {op} {c}/{d}.
        The least common denominator of {b} and {d} is {common}.
        Then {a}/{b} = {left}/{common} and {c}/{d} = {right}/{common}.
        Now {left} {op} {right} = {top}, so the result is {top}/{common}.
        {Fraction(top, common)}"""


def _percentage(rng: random.Random) -> str:
    price, off, tax = rng.randint(2, 60) * 20, rng.randint(1, 12) * 5, rng.randint(1, 5) * 5
    reduced = price * (100 - off) // 100  # exact: 20 and 5 divide the factors
    final = f"{reduced * (100 + tax) / 100:.2f}"
    thing = rng.choice(["coat", "bicycle", "printer", "table", "camera"])
    return f"""A {thing} costs ${price}. It is reduced by {off}%, then {tax}% tax is added. \
        What does the customer pay?
        {100 - off}% of the price remains: {price} * {100 - off} / 100 = {reduced} dollars.
        With the tax it is {reduced} * {100 + tax} / 100 = {final} dollars.
        ${final}"""


def _derivative(rng: random.Random) -> str:
    f = [*rng.choices(range(-9, 10), k=rng.randint(2, 4)), rng.randint(1, 9)]
    slope, at = [i * c for i, c in enumerate(f)][1:], rng.randint(-3, 3)
    values = [c * at**i for i, c in enumerate(slope)]
    ask = rng.choice([f"Find f'({at}).", f"What is the slope of its graph at x = {at}?"])
    return f"""Let f(x) = {_poly(*f)}. {ask}
        By the power rule f'(x) = {_poly(*slope)}.
        At x = {at} the terms are {", ".join(map(str, reversed(values)))}.
        Their sum is f'({at}) = {sum(values)}.
        {sum(values)}"""


def _divisors(rng: random.Random) -> str:
    g = rng.randint(2, 24)
    m, n = g * rng.randint(21, 40), g * rng.randint(2, 20)
    steps, a, b = "", m, n
    while b:
        steps += f"{a} = {a // b} * {b} + {a % b}.\n        "
        a, b = b, a % b
    return f"""Find the greatest common divisor and the least common multiple of {m} and {n}.
        {steps}The last remainder that is not zero gives gcd({m}, {n}) = {a}.
        Then lcm({m}, {n}) = {m} * {n} / {a} = {m * n // a}.
        gcd = {a}, lcm = {m * n // a}"""


def _sequence(rng: random.Random) -> str:
    a, d, n = rng.randint(-20, 30), rng.choice([*range(-9, 0), *range(1, 15)]), rng.randint(8, 40)
    last = a + (n - 1) * d
    return f"""The sequence {a}, {a + d}, {a + 2 * d}, ... is arithmetic. \
        Find the sum of its first {n} terms.
        The common difference is {a + d} - ({a}) = {d}.
        Term {n} is {a} + {n - 1} * ({d}) = {last}.
        The sum is {n} * ({a} + ({last})) / 2 = {n * (a + last) // 2}.
        {n * (a + last) // 2}"""


def _triangle(rng: random.Random) -> str:
    m, k = rng.randint(2, 30), rng.randint(1, 20)
    n = rng.randint(1, m - 1)
    a, b, c = k * (m * m - n * n), k * 2 * m * n, k * (m * m + n * n)
    return f"""A right triangle has legs of {a} cm and {b} cm. Find its perimeter and its area.
        By Pythagoras c^2 = {a}^2 + {b}^2 = {a * a} + {b * b} = {c * c}, so c = {c} cm.
        The perimeter is {a} + {b} + {c} = {a + b + c} cm.
        The area is {a} * {b} / 2 = {a * b // 2} square cm.
        perimeter {a + b + c} cm, area {a * b // 2} square cm"""


def _remainder(rng: random.Random) -> str:
    base, power, modulus = rng.randint(2, 30), rng.randint(5, 60), rng.randint(3, 50)
    bits = [1 << i for i in range(power.bit_length())]
    squares = ", ".join(f"{base}^{bit} leaves {pow(base, bit, modulus)}" for bit in bits)
    used = [bit for bit in bits if power & bit]
    return f"""What is the remainder of {base}^{power} on division by {modulus}?
        Square again and again: {squares}.
        Since {power} = {" + ".join(map(str, used))}, multiply \
        {" * ".join(str(pow(base, bit, modulus)) for bit in used)}.
        That product leaves {pow(base, power, modulus)}.
        {pow(base, power, modulus)}"""


def _urn(rng: random.Random) -> str:
    red, blue = rng.choices(range(2, 80), k=2)
    n, both = red + blue, Fraction(red * (red - 1), (red + blue) * (red + blue - 1))
    return f"""An urn holds {red} red and {blue} blue balls. Two are drawn without replacement. \
        What is the probability that both are red?
        The first ball is red with probability {red}/{n}.
        Then {red - 1} of the {n - 1} balls left are red.
        The product is {red}/{n} * {red - 1}/{n - 1} = {both}.
        {both}"""


_KINDS = [
    *(_shopping, _journey, _linear, _quadratic, _fractions, _percentage),
    *(_derivative, _divisors, _sequence, _triangle, _remainder, _urn),
]
_NAMES, _THINGS = map(
    str.split,
    [
        "Ada Ben Carla Dmitri Elif Farid Grace Hana Ivan Joao Kim Lena Musa Nora Omar Priya",
        "pens books apples lamps chairs tickets plates candles stamps maps jars ropes",
    ],
)


def _poly(*coefficients: int) -> str:
    """Coefficients from the constant upwards, as text from the highest power down."""
    text = ""
    for power, c in reversed(list(enumerate(coefficients))):
        if c:
            sign = (" - " if c < 0 else " + ") if text else "-" * (c < 0)
            variable = ["", "x"][power] if power < 2 else f"x^{power}"
            text += sign + ("" if abs(c) == 1 and power else str(abs(c))) + variable
    return text or "0"


# Pages


def _pages() -> Iterator[tuple[str, Spans]]:
    prose = [text for package in _PACKAGES for text in _docstrings(package)]
    random.Random("prose").shuffle(prose)
    for i in range(N_PAGES):
        rng = random.Random(f"pages/{i}")
        blocks = [(text, False) for text in prose[i::N_PAGES]]
        blocks += [(_noise(rng), False) for _ in range(rng.randint(4, 9))]
        blocks += [(worked(rng), True) for _ in range(rng.randint(0, 8))]
        rng.shuffle(blocks)
        yield _joined([(_noise(rng), False), *blocks, (_noise(rng), False)])


def _joined(blocks: list[tuple[str, bool]]) -> tuple[str, Spans]:
    text, spans = "", []
    for block, useful in blocks:
        if useful:
            spans.append((len(text), len(text) + len(block)))
        text += block + "\n\n"
    return text, tuple(spans)


@functools.cache
def _docstrings(package: str) -> list[str]:
    """The longer docstrings of an installed package, read from its source, never imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"builtin:pages quotes the package {package!r}: install it.")
    folder, texts = Path(found.origin).parent, list[str]()
    for file in sorted(folder.rglob("*.py")):
        if "tests" in file.relative_to(folder).parts:
            continue
        nodes: list[ast.AST] = [ast.parse(file.read_bytes())]
        while nodes:
            node = nodes.pop()
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            nodes += node.body
            text = ast.get_docstring(node) or ""
            if len(text) > 200:
                texts.append(text[:3000])
        if sum(map(len, texts)) > _PROSE:
            break
    return texts


def _noise(rng: random.Random) -> str:
    """A few lines of what surrounds text on the web."""
    word, page, year = rng.choice(_WORDS), rng.randint(2, 400), rng.randint(1998, 2026)
    date = (
        f"{year}-{page % 12 + 1:02}-{rng.randint(1, 28):02} {rng.randrange(24):02}:{page % 60:02}"
    )
    raw = rng.randbytes(rng.randint(12, 60))
    menu = rng.sample(_WORDS, 6)
    return rng.choice(
        [
            " | ".join(w.title() for w in menu),
            "Home > " + " > ".join(w.title() for w in menu[:3]) + f" > Page {page} of {page + 9}",
            "We use cookies to improve your experience. Accept all | Reject | Manage preferences",
            f"Copyright (c) {year} {word.title()} Inc. All rights reserved. Terms | Privacy",
            f"Posted by {word}{page} on {date} | Reply | Share | Report | {page} views",
            f'<div class="{word}-{menu[1]}" id="{raw[:4].hex()}"><span>{menu[2]}</spn></div',
            f"[{date}] {rng.choice(['INFO', 'WARN'])} {word}: request {raw[:8].hex()} done",
            f"sha256: {raw.hex()}",
            f"data:image/png;base64,{base64.b64encode(raw).decode()}",
            f"GET /v{page % 4}/{word}/{{id}}/{menu[3]}\n  200 OK\n  404 {menu[4]} not found",
            f".{word} {{ margin: {page % 40}px; color: #{raw[:3].hex()}; }}",
            f"https://www.{word}.example/{menu[1]}/{menu[2]}?id={page}&ref={raw[:5].hex()}",
            f'{{"{word}": {page}, "{menu[1]}": "{raw[:6].hex()}", "updated": "{date}"}}',
            f"Tags: {', '.join(menu)}\nLast modified: {date}\nViewed {page * 7} times",
            f"Sign in to {word} or create an account. Forgot password? Need help?",
            f"&nbsp;&laquo; Previous &raquo; Next &bull; {word.title()} Ã¢â‚¬â€œ {year}",
        ]
    )


_WORDS = str.split(
    "about archive blog browse careers cart catalog checkout contact data docs download events faq "
    "forum gallery help home index jobs legal login media news offers partners press pricing "
    "privacy products profile register releases reports search security services settings shop "
    "sitemap status store support team terms tools topics updates videos wiki"
)
