"""Pages as people open them: templates filled in, and passages with their tokens marked.

A page holds all it needs: style, script and figures are inline, and a content security policy
forbids every request, so that nothing is ever fetched. What it looks like is in templates/.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Array, Bool, Float
from markupsafe import Markup

from rho1_jax import files
from rho1_jax.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"

# name: (light theme, dark theme). The six hues are told apart by colour-blind readers too.
PALETTE = {
    "paper": ("#fdfcfa", "#17191c"),
    "panel": ("#f5f3ee", "#1e2125"),
    "ink": ("#24272b", "#e3e0da"),
    "muted": ("#686d73", "#9a9fa6"),
    "rule": ("#dedad2", "#363a40"),
    "blue": ("#0067a5", "#74b9ec"),
    "orange": ("#cc5500", "#f0914a"),
    "green": ("#008563", "#3fc49c"),
    "purple": ("#a8598a", "#d994c0"),
    "amber": ("#b98500", "#e8bd4d"),
}


class Chart(NamedTuple):
    """A figure and what is said below it."""

    svg: str
    caption: str


class _Token(NamedTuple):
    piece: str
    marks: str  # its classes
    rank: str
    measured: str  # what shows under the pointer, "" if it has no loss


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["palette"] = PALETTE
    environment.filters["three"] = lambda x: "–" if x is None else f"{x:.3f}"
    return environment


def render(template: str, *, folder: Path = TEMPLATES, **values: Any) -> Markup:
    """A template with `values`, which are escaped unless they are Markup.

    Looked for in `folder` first; there, too, it may extend `page.html` and use `parts.html`.
    """
    return Markup(_environment(folder).get_template(template).render(values))


def write(path: Path, template: str, *, folder: Path = TEMPLATES, **values: Any) -> None:
    """Writes `render(...)` whole or not at all; InputError if there is no writing to `path`."""
    content = render(template, folder=folder, **values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another.") from None


def passage(
    pieces: Sequence[str],
    loss: Float[Array | np.ndarray, " n"],
    ref_loss: Float[Array | np.ndarray, " n"] | None,
    score: Float[Array | np.ndarray, " n"] | None,
    selected: Bool[Array | np.ndarray, " n"],
    *,
    title: str = "",
) -> Markup:
    """A passage with its selected tokens marked; the values of each token show under the pointer.

    Args: the text of each token (they join to the passage; "" for a token that is only a part of a
    character), its losses in nats (NaN: it has none and is left plain), its score (None: colour
    and rank go by the loss, and nothing is marked that `selected` does not mark).
    Raises: ValueError if the lengths differ.
    """
    rank = _rank_percentile(np.asarray(loss if score is None else score))
    values = [_three_decimals(x, len(pieces)) for x in (loss, ref_loss, score)]
    columns = zip(pieces, *values, rank.tolist(), np.asarray(selected).tolist(), strict=True)
    return render(
        "passage.html",
        title=title,
        n_selected=int(np.sum(selected)),
        n_valid=int(np.isfinite(rank).sum()),
        by="loss" if score is None else "score",
        tokens=[_token(*column) for column in columns],
    )


def _rank_percentile(score: np.ndarray) -> np.ndarray:
    """Per token, the percentage of the other tokens that score lower; NaN where the score is."""
    ordered = np.sort(score[np.isfinite(score)])
    below = np.searchsorted(ordered, score, side="left")
    return np.where(np.isfinite(score), 100.0 * below / max(ordered.size - 1, 1), np.nan)


def _three_decimals(values: Any, n: int) -> list[str]:
    if values is None:
        return ["-"] * n
    return [f"{v:.3f}" if math.isfinite(v) else "-" for v in np.asarray(values).tolist()]


def _token(piece: str, loss: str, ref_loss: str, score: str, rank: float, selected: bool) -> _Token:
    marks = ["on"] * selected + ["nl"] * ("\n" in piece) + ["part"] * (not piece)
    shown = f"{rank:.0f}" if math.isfinite(rank) else ""
    measured = f"{loss} {ref_loss} {score} {shown}" if shown else ""
    return _Token(piece, " ".join(marks), shown, measured)
