"""Final answers: find one in a model's text, and compare it with the right one.

    python -m rho1_jax.evaluation.answers FILE... [--disagreements=OUT.csv]

grades released outputs again (.jsonl or .jsonl.gz; see `regrade`) and prints, per file, how often
this grader agrees with the verdicts stored there.
"""

import csv
import gzip
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rho1_jax.errors import InputError
from rho1_jax.evaluation import quantities
from rho1_jax.evaluation.symbolic import Judge

_judge = Judge()

_NEXT_PROBLEM = re.compile(r"\n\s*(?:Question|Problem|Q)\s*\d*\s*[:.]\s")
_MINERVA = re.compile(
    r"final answer is:?\s*\$((?:(?!final answer).)*?)\$\.?\s*I hope it is correct", re.S
)
_STATED = re.compile(r"\banswer is\b:?|\banswer:|####", re.I)
_OUTPUT = re.compile(r"```output\n(.*?)\n?(?:```|\Z)", re.S)
_NUMBER = re.compile(r"-?\$?\d+(?:,\d+)*(?:\.\d+)?(?:/\d+)?%?|-?\.\d+")
_EQUALS = re.compile(r"(?<![<>!])=")
_PROSE = re.compile(r"(?<!\\)\b[A-Za-z']{2,}\s+(?:[A-Za-z']+\s+)+[A-Za-z']{2,}")
_LETTER = re.compile(r"[(\[]?([A-J])(?:[)\].:,]|\s*$).*", re.S)


class Verdict(NamedTuple):
    correct: bool
    why: str  # which comparison decided: text, choice, number, symbolic, timeout, no answer


def extract(text: str, strict: bool = False) -> str | None:
    """The final answer a text gives, as it is written there; None if it gives none.

    In this order: "the final answer is $X$. I hope it is correct", the last \\boxed{X}, the last
    "the answer is X", the last number after the last program output, that output, the last number.
    What follows a first answer and the head of another problem is not looked at.

    strict: X is the rest of the line as it stands, as the paper's authors read it. Otherwise it
    ends with its sentence, and of "3 + 4 = 7" it is the 7.
    """
    text = _this_problem(text)
    if found := _MINERVA.findall(text):
        answer = found[-1]
    elif boxed := _boxed(text):
        answer = boxed
    elif _STATED.search(text):
        answer = (_STATED.split(text)[-1].strip().splitlines() or [""])[0]
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
    if letter := re.fullmatch(r"\(?([A-J])\)?", _plain(gold, fold=False)):
        chosen = _LETTER.fullmatch(_plain(answer, fold=False))
        return Verdict(chosen is not None and chosen[1] == letter[1], "choice")
    gold, answer = _right_side(gold), _right_side(answer)
    quantity = quantities.parse(gold), quantities.parse(answer)
    if quantity[0] is not None and quantity[1] is not None:
        return Verdict(quantities.equal(quantity[0], quantity[1]), "number")
    # math-verify would pick some expression out of a sentence or a derivation.
    equation = bool(_EQUALS.search(answer)) > bool(_EQUALS.search(gold))
    if equation or _PROSE.search(answer) or len(answer) > 20 * len(gold) + 200:
        return Verdict(False, "text")
    equal = _judge.equal(_for_sympy(gold), _for_sympy(answer))
    return Verdict(bool(equal), "timeout" if equal is None else "symbolic")


def _last_number(text: str) -> str:
    outputs = list(_OUTPUT.finditer(text))
    after = text[outputs[-1].end() :] if outputs else text
    if numbers := _NUMBER.findall(after):
        return numbers[-1]
    return outputs[-1].group(1).strip().rpartition("\n")[2] if outputs else ""


def _this_problem(text: str) -> str:
    """The text up to the head of a next problem, if an answer was given before it."""
    for head in _NEXT_PROBLEM.finditer(text):
        before = text[: head.start()]
        if _STATED.search(before) or _boxed(before):
            return before
    return text


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


_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"), ("**", "**"), ("`", "`"))


def _tidied(text: str) -> str:
    """Without what surrounds an answer: mathematics and emphasis marks, a full stop."""
    text = text.strip()
    before = None
    while text != before:
        before = text
        text = text.strip().rstrip(".:;,").strip()
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            enough = len(text) > len(left) + len(right)
            if enough and text.startswith(left) and text.endswith(right) and left not in inner:
                text = inner
    return text


_DECORATION = re.compile(
    r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![a-z])|(?<!\\)\\[,!;: ]|~"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def _plain(text: str, fold: bool = True) -> str:
    """The characters that matter for two answers to be the same text."""
    text = _TEXT.sub(r"\1", _DECORATION.sub("", text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"[\s$]+", "" if fold else " ", text).strip()
    return text.lower() if fold else text


_NAMED = re.compile(r"\s*([A-Za-z]\w*(?:\([a-z]\))?)\s*(?:=|\\in)\s*([^=]+)")
_BETWEEN = re.compile(r"\s*,\s*(?:and|or)?\s*|\s+(?:and|or)\s+|\\text\s*\{\s*(?:and|or)\s*\}")


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
    text = _DECORATION.sub(" ", text).replace("$", " ")
    text = re.sub(r"(?<!\\)\b(?:sqrt)\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|infty|infinity|oo)(?![A-Za-z])", _as_latex, text)
    text = _BETWEEN.sub(", ", text).replace("<=", r"\le ").replace(">=", r"\ge ")
    text = re.sub(r"(?<=\d)[eE](-?\d+)", r" \\cdot 10^{\1}", text)
    text = re.sub(r"(?<![\w\\])(\d+)\s*\(", r"\1 \\cdot (", text)
    return text.replace("**", "^").replace("*", r" \cdot ").replace("√", r"\sqrt ")


def _as_latex(name: re.Match[str]) -> str:
    return r"\pi " if name[1] == "pi" else r"\infty "


# Released outputs

_TEXT_FIELDS = ("code", "completion", "output", "response", "generation", "prediction", "text")
_GOLD_FIELDS = ("answer", "gt", "gold", "target", "ground_truth", "gt_cot", "solution")
_SCORE_FIELDS = ("score", "correct", "is_correct", "acc")


class Graded(NamedTuple):
    id: str
    ours: Verdict  # of the strict reading
    lenient: Verdict
    theirs: bool | None  # None where the file holds no verdict
    gold: str
    answer: str | None


def regrade(path: str | Path) -> Iterator[Graded]:
    """Every model text of a .jsonl or .jsonl.gz file, graded again.

    A row has the text (`code`, `completion`, `output`, ...: a string, or a list of samples), the
    right answer (`answer`, `gt`, `target`, ...) and, where known, a verdict (`score`, ...).
    InputError names the first line that has not.
    """
    try:
        with _open(Path(path)) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _graded(line, f"{path}, line {number}", str(number - 1))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a .jsonl or .jsonl.gz.") from error


def _open(path: Path):
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open()


def _graded(line: str, where: str, number: str) -> Iterator[Graded]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}.") from error
    texts, golds, scores = (
        next((row[f] for f in fields if row.get(f) is not None), None)
        for fields in (_TEXT_FIELDS, _GOLD_FIELDS, _SCORE_FIELDS)
    )
    if texts is None or golds is None:
        missing = _TEXT_FIELDS if texts is None else _GOLD_FIELDS
        raise InputError(f"{where} has none of the fields {', '.join(missing)}.")
    texts = texts if isinstance(texts, list) else [texts]
    scores = scores if isinstance(scores, list) else [scores] * len(texts)
    gold = gold_answer(golds)
    for i, text in enumerate(texts):
        strict, lenient = extract(str(text), strict=True), extract(str(text))
        theirs = bool(scores[i]) if i < len(scores) and scores[i] is not None else None
        name = str(row.get("idx", row.get("id", number))) + (f"/{i}" if i else "")
        ours = compare(gold, strict)
        other = ours if lenient == strict else compare(gold, lenient)
        yield Graded(name, ours, other, theirs, gold, strict)


def gold_answer(field: Any) -> str:
    """The answer in a data set's field: itself, or what a solution ends with (#### or a box)."""
    text = str(int(field) if isinstance(field, float) and field.is_integer() else field)
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return _boxed(text) or text


def main(argv: Sequence[str]) -> int:
    """Print the agreement per file; exit status 2 for bad input."""
    out = [a.removeprefix("--disagreements=") for a in argv[1:] if a.startswith("--disagreements=")]
    files = [a for a in argv[1:] if not a.startswith("--")]
    if not files:
        print(__doc__)
        return 2
    rows: list[tuple[Any, ...]] = [("file", "id", "ours", "theirs", "decided by")]
    try:
        for name in files:
            graded = list(regrade(name))
            print(_summary(name, graded), flush=True)
            rows += [
                (Path(name).name, g.id, g.ours.correct, g.theirs, g.ours.why)
                for g in graded
                if g.theirs not in (None, g.ours.correct)
            ]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if out:
        with open(out[0], "w", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows(rows)
    return 0


def _summary(name: str, graded: list[Graded]) -> str:
    n, known = len(graded), [g for g in graded if g.theirs is not None]
    agree = sum(g.ours.correct == g.theirs for g in known)
    strict, lenient = (
        100 * sum(correct) / max(n, 1)
        for correct in ([g.ours.correct for g in graded], [g.lenient.correct for g in graded])
    )
    ours = f"ours {strict:.1f}% (read leniently {lenient:.1f}%)"
    if not known:
        return f"{name}: {n} texts, correct: {ours}; the file holds no verdicts"
    theirs = 100 * sum(bool(g.theirs) for g in known) / len(known)
    return (
        f"{name}: agreement {agree}/{len(known)} = {100 * agree / len(known):.2f}%; "
        f"correct: {ours}, theirs {theirs:.1f}%"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
