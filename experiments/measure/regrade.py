"""Released outputs of a model, graded again and compared with the verdicts stored with them.

    python -m experiments.measure.regrade FILE... [--disagreements=OUT.csv]

takes .jsonl or .jsonl.gz (see `regrade`) and prints, per file, how often this grader agrees.
"""

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rho1_jax import command_line, files
from rho1_jax.errors import InputError
from rho1_jax.evaluation import answers

_TEXT_FIELDS = ("code", "completion", "output", "response", "generation", "prediction", "text")
_GOLD_FIELDS = ("answer", "gt", "gold", "target", "ground_truth", "gt_cot", "solution")
_SCORE_FIELDS = ("score", "correct", "is_correct", "acc")


class Graded(NamedTuple):
    id: str
    ours: answers.Verdict  # of the strict reading
    lenient: answers.Verdict
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
    gold = answers.gold_answer(golds)
    for i, text in enumerate(texts):
        strict, lenient = answers.extract(str(text), strict=True), answers.extract(str(text))
        theirs = bool(scores[i]) if i < len(scores) and scores[i] is not None else None
        name = str(row.get("idx", row.get("id", number))) + (f"/{i}" if i else "")
        ours = answers.compare(gold, strict)
        other = ours if lenient == strict else answers.compare(gold, lenient)
        yield Graded(name, ours, other, theirs, gold, strict)


def main(argv: Sequence[str]) -> int:
    """Print the agreement per file; exit status 2 for bad input."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> None:
    found = command_line.parse(argv, {"disagreements": Path}, words=("FILE...",))
    rows: list[tuple[Any, ...]] = [("file", "id", "ours", "theirs", "decided by")]
    for name in found.words:
        graded = list(regrade(name))
        print(_summary(name, graded), flush=True)
        rows += [
            (Path(name).name, g.id, g.ours.correct, g.theirs, g.ours.why)
            for g in graded
            if g.theirs not in (None, g.ours.correct)
        ]
    if found.disagreements:
        with io.StringIO(newline="") as text:
            csv.writer(text, lineterminator="\n").writerows(rows)
            files.write(found.disagreements, text.getvalue())


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
