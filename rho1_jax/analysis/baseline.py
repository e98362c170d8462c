"""A run beside its baseline: did it help? What the report's first screen says of two folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rho1_jax.analysis import figures, records
from rho1_jax.analysis.figures import short_count
from rho1_jax.analysis.page import Chart
from rho1_jax.analysis.records import listed
from rho1_jax.errors import InputError


class Row(NamedTuple):
    """Held-out loss of one domain in nats per token, and ours minus the baseline's, in words."""

    domain: str
    baseline: float
    ours: float
    difference: str


class Comparison(NamedTuple):
    """What is shown; `caveat` is what the numbers cannot say."""

    result: str
    rows: list[Row]
    caveat: str
    chart: Chart | None


def compare(folder: Path, baseline: Path) -> Comparison:
    """The finished run in `folder` beside the one in `baseline`, on the same held-out text.

    Raises: InputError if a file of either is broken or they share no held-out text.
    """
    ours, theirs = (records.read_eval(path / "eval.json") for path in (folder, baseline))
    a, b = records.losses(ours, "policy"), records.losses(theirs, "policy")
    domains = [name for name in a if name in b and _same_text(ours, theirs, name)]
    if not domains:
        raise InputError(
            f"{baseline} has no held-out loss on the same text as {folder}: "
            "evaluate both, and compare runs on one corpus."
        )
    rows = [Row(name, b[name], a[name], _signed(a[name] - b[name])) for name in domains]
    return Comparison(
        _against(rows) + _method(baseline, theirs),
        rows,
        _caveat(folder, baseline, left_out=[name for name in a if name not in domains]),
        _chart(folder, baseline, domains),
    )


def _same_text(ours: Mapping[str, Any], theirs: Mapping[str, Any], domain: str) -> bool:
    """Whether both were evaluated on the same rows, where their folders know it."""
    known = [evals.get("binding", {}).get(domain) for evals in (ours, theirs)]
    return None in known or known[0] == known[1]


def _signed(difference: float) -> str:
    shown = f"{difference:+.3f}"
    return "0.000" if float(shown) == 0.0 else shown.replace("-", "\N{MINUS SIGN}")


def _against(rows: list[Row]) -> str:
    """As in: its held-out loss is lower than the baseline's on a, and higher on b."""
    words = {"lower": "\N{MINUS SIGN}", "equal": "0", "higher": "+"}
    parts: list[str] = []
    for word, first in words.items():
        where = [row.domain for row in rows if row.difference.startswith(first)]
        if where:
            than = f" {'to' if word == 'equal' else 'than'} the baseline's" if not parts else ""
            parts.append(f"{word}{than} on {listed(where)}")
    return f"Its held-out loss is {', and '.join(parts)}."


def _method(baseline: Path, evals: Mapping[str, Any]) -> str:
    said, name = evals.get("selection", {}).get("said"), baseline.resolve().name
    named = "" if name == "baseline" else f" {name},"
    return f" In the baseline,{named} {said}." if said else ""


def _caveat(folder: Path, baseline: Path, *, left_out: list[str]) -> str:
    """What else differs, and that one run each is no proof."""
    said = []
    if left_out:
        said.append(f"Not compared, for the baseline has no such text: {listed(left_out)}.")
    tokens = [_tokens(path) for path in (folder, baseline)]
    if tokens[0] == tokens[1]:
        said.append(f"Both saw {short_count(tokens[0])} training tokens;")
    else:
        ours, theirs = map(short_count, tokens)
        said.append(f"Not at equal tokens: this run saw {ours}, the baseline {theirs};")
    said.append("what a reference and scoring cost is not counted.")
    seeds = [records.read_json(path / "config.json").get("seed") for path in (folder, baseline)]
    which = f" (seeds {seeds[0]} and {seeds[1]})" if None not in seeds else ""
    if seeds[0] == seeds[1] is not None:
        which = f" (seed {seeds[0]})"
    said.append(
        f"One run of each{which}: how far another seed would move these differences is not "
        "measured, so a small one may be chance."
    )
    return " ".join(said)


def _tokens(folder: Path) -> float:
    return float(records.read_metrics(folder / "metrics.csv")["tokens"][-1])


def _chart(folder: Path, baseline: Path, domains: list[str]) -> Chart | None:
    curves, theirs = (records.read_heldout(path / "heldout.csv") for path in (folder, baseline))
    both: dict[str, tuple[np.ndarray, np.ndarray]] = {
        name: curves[name] for name in domains if name in curves and name in theirs
    }
    if not both:
        return None
    scales = ", a panel for each domain; their scales differ" if len(both) > 1 else ""
    caption = f"Held-out loss over training{scales}."
    return Chart(figures.beside_baseline(both, theirs), caption)
