"""Final answers: find one in a model's text, and compare it with the right one.

docs/grading.md says what counts as the same answer; experiments/measure/regrade.py grades released
outputs again.
"""

import re
import unicodedata
from typing import Any, NamedTuple

from rho1_jax.evaluation import quantities
from rho1_jax.evaluation.symbolic import Judge

_judge = Judge()

_LONGEST = 2000  # characters of an answer; a longer one is compared as it stands

# No two neighbouring repetitions here match the same character: such patterns take quadratic time.
_NEXT_PROBLEM = re.compile(r"\n[ \t]*(?:Question|Problem|Q)\s*(?:\d+\s*)?[:.]\s")
_ANSWERED = re.compile(r"\banswer is\b|\banswer:|####|\\(?:boxed|fbox)[\s{]*[^\s{}]", re.I)
_MINERVA = re.compile(
    r"final answer is:?\s*\$((?:(?!final answer).)*?)\$\.?\s*I hope it is correct", re.S
)
_STATED = re.compile(r"\banswer is\b:?|\banswer:|####", re.I)
_OUTPUT = re.compile(r"```output\n(.*?)\n?(?:```|\Z)", re.S)
_NUMBER = re.compile(r"-?\$?\d+(?:,\d+)*(?:\.\d+)?(?:/\d+)?%?|-?\.\d+")
_EQUALS = re.compile(r"(?<![<>!])=")
_PROSE = re.compile(r"(?<!\\)\b[A-Za-z']{2,}\s+(?:[A-Za-z']+\s+)+[A-Za-z']{2,}")


class Verdict(NamedTuple):
    correct: bool
    why: str  # which comparison decided: text, choice, unit, number, symbolic, timeout, no answer


def extract(text: str, strict: bool = False) -> str | None:
    """The final answer a text gives, as it is written there; None if it gives none.

    In this order: "the final answer is $X$. I hope it is correct", the last \\boxed{X}, the last
    "the answer is X", the last number after the last program output, that output, the last number.
    What follows a first answer and the head of another problem is not looked at.

    strict: X is the rest of the line as it stands, as the paper's authors read it. Otherwise it
    ends with its sentence, and of "3 + 4 = 7" it is the 7. Time is linear in the text.
    """
    text = _this_problem(text)
    if found := _MINERVA.findall(text):
        answer = found[-1]
    elif boxed := _boxed(text):
        answer = boxed
    elif _STATED.search(text):
        answer = (_STATED.split(text)[-1].strip().splitlines() or [""])[0]
        if len(answer) > _LONGEST:
            return answer
        if _PROSE.search(answer) and "answer is" not in text.lower():
            answer = _last_number(text)  # "Answer: Let's think step by step" only begins
        elif not strict:
            answer = _result(_tidied(_first_sentence(answer)))
    else:
        answer = _last_number(text)
    return _tidied(answer) or None


def compare(gold: str, answer: str | None) -> Verdict:
    """Whether `answer` says the same as `gold`; both as people or models write them.

    Choices compare by their letter, quantities by value and unit (a unit that only one of them
    names is no difference), everything else symbolically, under a limit of time and memory.
    """
    if answer is None or not answer.strip():
        return Verdict(False, "no answer")
    gold, answer = _tidied(gold), _tidied(answer)
    if _plain(gold) == _plain(answer):
        return Verdict(True, "text")
    if max(len(gold), len(answer)) > _LONGEST:
        return Verdict(False, "text")
    if letter := _CHOICE.fullmatch(_plain(gold, fold=False)):
        chosen = _chosen(answer) or _chosen(_said(gold, answer))
        return Verdict(chosen == letter[1], "choice")
    answer = _said(gold, answer)
    if len(answer) > 20 * len(gold) + 200:
        return Verdict(False, "text")
    a, b = (quantities.parse(_right_side(text)) for text in (gold, answer))
    if not quantities.agree(a.unit, b.unit):
        return Verdict(False, "unit")
    if a.value is not None and b.value is not None:
        return Verdict(quantities.equal(a, b), "number")
    if a.unit.dimension and b.unit.dimension and a.unit.size != b.unit.size:
        return Verdict(False, "unit")
    if _plain(a.text) == _plain(b.text):
        return Verdict(True, "text")
    # math-verify would multiply the letters of a word, and take one side of a derivation.
    equation = bool(_EQUALS.search(b.text)) > bool(_EQUALS.search(a.text))
    if equation or _WORD.fullmatch(a.text) or _PROSE.search(b.text):
        return Verdict(False, "text")
    equal = _judge.equal(_for_sympy(a.text), _for_sympy(b.text))
    return Verdict(bool(equal), "timeout" if equal is None else "symbolic")


def _last_number(text: str) -> str:
    outputs = list(_OUTPUT.finditer(text))
    after = text[outputs[-1].end() :] if outputs else text
    if numbers := _NUMBER.findall(after):
        return numbers[-1]
    return outputs[-1].group(1).strip().rpartition("\n")[2] if outputs else ""


def _this_problem(text: str) -> str:
    """The text up to the head of a next problem, if an answer was given before it."""
    answered = _ANSWERED.search(text)
    head = _NEXT_PROBLEM.search(text, answered.end()) if answered else None
    return text[: head.start()] if head else text


def _boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces balanced; a box never closed ends with its line."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("ed" if text[start + 1] == "b" else "box")[2].lstrip()
    if not rest.startswith("{"):
        return re.split(r"[$\n]", rest)[0]
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return rest[1:].splitlines()[0] if rest[1:] else ""


def _first_sentence(line: str) -> str:
    """Up to a full stop, or the end of the mathematics that the line begins with."""
    math_first = re.match(r"\s*(\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\])", line)
    if math_first and not line[math_first.end() :].startswith((" and ", ", ", " or ", " \\")):
        return math_first[1]
    return re.split(r"\.(?:\s|$)", line)[0]


def _result(text: str) -> str:
    """What arithmetic comes to: the end of "3 + 4 = 7", but no part of an equation in x."""
    derivation, _, result = text.rpartition("=")
    arithmetic = re.search(r"\d", derivation) and not re.search(r"\b\d*[a-zA-Z]\b|\\", derivation)
    return result if arithmetic else text


_CHOICE = re.compile(r"[(\[]?([A-J])[)\]]?")
_REASON = r"(?:because|since|as|is (?:the )?(?:correct|right|best|answer))\b"
_CHOSEN = re.compile(rf"[(\[]?([A-J])(?:[)\].:,]|\s*$|\s+(?={_REASON}))(.*)", re.S)
_OTHER_LETTER = re.compile(r"(?<![A-Za-z])([A-J])(?=[)\].:,]|\s*$)|^\s*(?:,|and|or|/)\s*([A-J])\b")


def _chosen(answer: str) -> str | None:
    """The letter that an answer begins with, if it does not go on to name another."""
    if not (found := _CHOSEN.fullmatch(_plain(answer, fold=False))):
        return None
    letter, rest = found.groups()
    others = {a or b for a, b in _OTHER_LETTER.findall(rest)} - {letter}
    return letter if re.match(rf"[\s,.:;]*{_REASON}", rest) or not others else None


_SENTENCE = re.compile(r"([A-Za-z$\\(][^.=]*?)\s+(?:is|are|equals)\s+(?:equal to\s+)?(.+)", re.S)
_DENIED = re.compile(
    r"\b(?:not?|never|cannot|wrong|incorrect|if|unless|whether)\b|n't\b|\d+\s*$", re.I
)
_ABOUT = re.compile(r"(?:about|approximately|approx\.?|roughly|around|\\approx|≈|~)\s*(?=\S)", re.I)


def _said(gold: str, answer: str) -> str:
    """What "the largest n is X" or "about X" says: X. A denial, or two verbs, say nothing."""
    found = _SENTENCE.fullmatch(answer)
    if found and not re.search(r"\b(?:is|are)\b", gold + found[2]) and not _DENIED.search(found[1]):
        answer = _tidied(found[2])
    return _tidied(_ABOUT.sub("", answer, count=1) if _ABOUT.match(answer) else answer)


_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"), ("**", "**"), ("`", "`"))
_CHARACTERS = str.maketrans(
    {
        "−": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    }
)  # fmt: skip


def _tidied(text: str) -> str:
    """In LaTeX's characters, without what surrounds an answer: emphasis marks, a full stop."""
    text = text.translate(_CHARACTERS)
    text = re.sub("[¼½¾⅐-⅞]", lambda m: f" {_compatible(m[0])}", text)
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: f"^{{{_compatible(m[0])}}}", text)
    before = None
    while text != before:
        before = text
        text = text.strip().rstrip(".:;, \t\n")
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            enough = len(text) > len(left) + len(right)
            if enough and text.startswith(left) and text.endswith(right) and left not in inner:
                text = inner
    return text


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("−", "-")


_NOTHING = re.compile(
    r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![a-z])|\\!\s*|\{(?=,\})|(?<=,)\}"
)
_SPACE = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"\\(?:text|mbox)\s*\{\s*[A-Za-z]{3,}\s*\}|[A-Z][a-z]{2,}|[a-z]{5,}")


def _undecorated(text: str) -> str:
    return _SPACE.sub(" ", _NOTHING.sub("", text))


def _plain(text: str, fold: bool = True) -> str:
    """The characters that matter for two answers to be the same text."""
    text = _TEXT.sub(r"\1", _undecorated(text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    if not fold:
        return re.sub(r"[\s$]+", " ", text).strip()
    text = re.sub(r"(?<=\d)\s+(?=\d)|(?<=\d,)\s+(?=\d{3}(?!\d))", "\0", text)  # 3 1/2 is not 31/2
    return re.sub(r"[\s$]+", "", text).lower()


_NAMED = re.compile(r"\s*([A-Za-z]\w*(?:\([a-z]\))?)\s*(?:=|\\in(?![a-z]))\s*([^=]+)")
_BETWEEN = re.compile(r"\s*,\s*(?:and\b|or\b|\\text\s*\{\s*(?:and|or)\s*\})?\s*"
                      r"|\s+(?:and|or)\s+|\s*\\text\s*\{\s*(?:and|or)\s*\}\s*")  # fmt: skip


def _right_side(text: str) -> str:
    """What follows "x =", "f(x) =" or "x \\in", also in each part of "x = 2 or x = 3"."""
    if found := _NAMED.fullmatch(text):
        return found[2]
    parts = [_NAMED.fullmatch(part) for part in _BETWEEN.split(text)]
    if None in parts or len({part[1] for part in parts if part}) > 1:
        return text
    return ", ".join(part[2] for part in parts if part)


def _for_sympy(text: str) -> str:
    """Plain notation that models use, as the LaTeX that math-verify reads."""
    text = re.sub(r"[$\s]+", " ", _undecorated(text))
    text = re.sub(r"(?<!\\)\b(?:sqrt)\(([^()]*)\)", r"\\sqrt{\1}", text)
    for root, latex in (("√", r"\\sqrt"), ("∛", r"\\sqrt[3]"), ("∜", r"\\sqrt[4]")):
        text = re.sub(rf"{root}\s*\(([^()]*)\)|{root}\s*(\d+|\w)", rf"{latex}{{\1\2}}", text)
    text = re.sub(r"\\sqrt\s*\[(\d+)\]\s*(\w)", r"\\sqrt[\1]{\2}", text)
    text = re.sub(r"(?<![\w.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|infty|infinity|oo)(?![A-Za-z])", _as_latex, text)
    text = _BETWEEN.sub(", ", text).replace("<=", r"\le ").replace(">=", r"\ge ")
    text = re.sub(r"(?<=\d)[eE](-?\d+)", r" \\cdot 10^{\1}", text)
    text = re.sub(r"(?<![\w\\^.])(\d+)\s*\(", r"\1 \\cdot (", text)
    return text.replace("**", "^").replace("*", r" \cdot ")


def _as_latex(name: re.Match[str]) -> str:
    return r"\pi " if name[1] == "pi" else r"\infty "


def gold_answer(field: Any) -> str:
    """The answer in a data set's field: itself, or what a solution ends with (#### or a box)."""
    text = str(int(field) if isinstance(field, float) and field.is_integer() else field)
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return _boxed(text) or text
