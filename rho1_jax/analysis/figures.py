"""The report's figures: numbers in, inline SVG out.

Each function is pure and returns one `<svg>` element for a page (page.py): the same numbers give
the same characters, colours are the page's (both themes are legible), text stays text, and nothing
outside the element is referred to.
"""

import io
import math
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rho1_jax.analysis.page import PALETTE

INK, MUTED, RULE = (PALETTE[name][0] for name in ("ink", "muted", "rule"))
SUBSETS = {
    "all": PALETTE["ink"][0],
    "selected": PALETTE["blue"][0],
    "unselected": PALETTE["orange"][0],
}
SERIES = [PALETTE[name][0] for name in ("blue", "orange", "green", "purple", "amber", "ink")]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rho1_jax",
    "path.simplify": False,
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "legend.handlelength": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "text.color": INK,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}
WIDTH = 5.8  # inches of 72 SVG units: 9-unit text is about 14 px on a 640 px column
DASHED = (0, (4, 2))
MAX_POINTS = (
    160  # per line: more than the eye sees at that width, few enough to keep the page small
)


def short_count(value: float) -> str:
    """A count as people say it: 950, 12k, 1.2M, 80B."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def points_per_mean(n: int) -> int:
    """How many of n logged steps are averaged into one point of a training curve."""
    return max(1, math.ceil(n / MAX_POINTS))


def losses_over_tokens(
    tokens: Float[np.ndarray, "steps"],
    policy: Mapping[str, Float[np.ndarray, "steps"]],
    reference: Mapping[str, Float[np.ndarray, "steps"]],
) -> str:
    """Training loss of policy (solid) and reference (dashed) on all, selected, unselected tokens.

    Args: training tokens seen at each step; losses in nats per token under some of the names
    "all", "selected" and "unselected", one panel each (NaN where not known). The shaded gap between
    the two lines is the mean excess loss.
    """
    subsets = [name for name in SUBSETS if name in policy]
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 2.75), layout="constrained")
        panels = figure.subplots(1, len(subsets), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, subsets, strict=True):
            x, solid, dashed = _thin(tokens, policy[name], reference.get(name))
            axes.plot(x, solid, color=SUBSETS[name])
            if dashed is not None:
                axes.plot(x, dashed, color=SUBSETS[name], linestyle=DASHED, linewidth=1.2)
                axes.fill_between(x, solid, dashed, color=SUBSETS[name], alpha=0.12, linewidth=0)
            axes.set_title(f"{name} tokens", loc="left")
            _token_axis(axes, ticks=3)
        panels[0].set_ylabel("loss, nats per token")
        figure.supxlabel("training tokens seen", color=MUTED, fontsize=9)
        lines = [Line2D([], [], color=INK)]
        if reference:
            lines.append(Line2D([], [], color=INK, linestyle=DASHED, linewidth=1.2))
        _legend(figure, lines, ["policy", "reference"][: len(lines)])
        return _svg(figure, "Training losses of policy and reference over tokens")


def heldout_over_tokens(
    curves: Mapping[str, tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]],
    reference: Mapping[str, float],
) -> str:
    """Held-out loss of the policy per domain over training; the reference's as a dashed level.

    Args: per domain (training tokens seen, loss in nats per token); the reference's loss of each
    domain where it is known.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 2.9), layout="constrained")
        axes = figure.subplots()
        lines = []
        for i, (domain, (tokens, loss)) in enumerate(curves.items()):
            colour, marker = SERIES[i % len(SERIES)], "os^D"[i // len(SERIES) % 4]
            lines += axes.plot(
                tokens, loss, color=colour, marker=marker, markersize=3.5, label=domain
            )
            if domain in reference:
                axes.axhline(reference[domain], color=colour, linestyle=DASHED, linewidth=1.0)
        labels = list(curves)
        if set(curves) & set(reference):
            lines.append(Line2D([], [], color=INK, linestyle=DASHED, linewidth=1.0))
            labels.append("reference")
        axes.set_xlabel("training tokens seen")
        axes.set_ylabel("held-out loss, nats per token")
        _token_axis(axes, ticks=6)
        _legend(figure, lines, labels)
        return _svg(figure, "Held-out loss per domain over training")


def beside_baseline(
    curves: Mapping[str, tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]],
    baseline: Mapping[str, tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]],
) -> str:
    """Held-out loss of a run (solid, blue) and of its baseline (dashed, orange), a panel a domain.

    Args: per domain (training tokens seen, loss in nats per token); the same domains in both.
    """
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 0.75 + 1.6 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).flat
        for axes, domain in zip(panels, curves, strict=False):
            axes.plot(*baseline[domain], color=SERIES[1], linestyle=DASHED)
            axes.plot(*curves[domain], color=SERIES[0])
            axes.set_title(domain, loc="left")
            _token_axis(axes, ticks=3)
        for axes in panels[len(curves) :]:
            axes.remove()
        figure.supylabel("held-out loss, nats", color=MUTED, fontsize=9)
        figure.supxlabel("training tokens seen", color=MUTED, fontsize=9)
        lines = [
            Line2D([], [], color=SERIES[0]),
            Line2D([], [], color=SERIES[1], linestyle=DASHED),
        ]
        _legend(figure, lines, ["this run", "baseline"])
        return _svg(figure, "Held-out loss of this run and its baseline over training")


def score_histogram(
    scores: Float[np.ndarray, "n"],
    threshold: float,
    useful: Bool[np.ndarray, "n"] | None,
    *,
    label: str,
) -> str:
    """Distribution of the per-token score, with the selection threshold.

    Args: the scores, the lowest one that was selected, and, where the truth is known, which tokens
    are worth learning: then two distributions, each as a share of all tokens, so that their sizes
    compare; the label of the score's axis, with its unit. The extremes, 1 % of the tokens, lie
    outside.
    """
    low, high = np.quantile(scores, [0.005, 0.995])
    low, high = min(low, threshold), max(high, threshold)
    edges = np.linspace(low, high if high > low else low + 1.0, 61)
    parts = {"all tokens": np.ones(scores.shape, bool)}
    if useful is not None:
        parts = {"useful tokens": useful, "noise": ~useful}
    colours = [SERIES[2], SERIES[1]] if useful is not None else [SERIES[0]]
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 2.7), layout="constrained")
        axes = figure.subplots()
        lines = []
        for part, colour in zip(parts.values(), colours, strict=True):
            counts = np.histogram(scores[part], edges)[0]
            share = 100.0 * counts / scores.size
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.18)
            axes.stairs(share, edges, color=colour, linewidth=1.3)
            lines.append(Line2D([], [], color=colour))
        lines.append(axes.axvline(threshold, color=INK, linewidth=1.0, linestyle=(0, (1, 1.5))))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0.0, None)
        axes.set_xlabel(label)
        axes.set_ylabel("tokens per bin, % of all")
        _legend(figure, lines, [*parts, "threshold: selected to its right"])
        return _svg(figure, "Distribution of the per-token score")


def precision_bars(precision: Mapping[str, tuple[float, float]], *, used: str | None) -> str:
    """Which part of each score's selection is useful, against the chance line.

    Args: per score (precision, share of useful tokens), both in [0, 1]; the score that the run
    trained with, which is drawn in the selection's colour.
    """
    ordered = sorted(precision.items(), key=lambda item: item[1][0])
    values = [100.0 * p for _, (p, _) in ordered]
    chance = [100.0 * u for _, (_, u) in ordered]
    rows = range(len(ordered))
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x", "ytick.color": INK}):
        figure = Figure((WIDTH, 0.85 + 0.27 * len(ordered)), layout="constrained")
        axes = figure.subplots()
        colours = [
            to_rgba(*((SERIES[0], 0.85) if name == used else (MUTED, 0.45))) for name, _ in ordered
        ]
        axes.barh(rows, values, height=0.62, color=colours)
        for row, value in zip(rows, values, strict=True):
            axes.text(
                1.0,
                row,
                f"{value:.1f}",
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
            )
        axes.vlines(chance, np.subtract(rows, 0.5), np.add(rows, 0.5), color=INK, linewidth=1.0)
        axes.set_yticks(rows, [name for name, _ in ordered])
        axes.set_xlim(0.0, 1.12 * max(*values, *chance, 1.0))
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("useful tokens among the selected, %")
        chance_line = Line2D([], [], color=INK, linewidth=1.0)
        _legend(figure, [chance_line], ["chance: useful share of all tokens"])
        return _svg(figure, "Precision of each score")


def _thin(x: np.ndarray, *lines: np.ndarray | None) -> list:
    """Means over runs of neighbouring points; None stays None."""
    starts = np.arange(0, x.size, points_per_mean(x.size))
    sizes = np.diff(np.append(starts, x.size))
    return [None if y is None else np.add.reduceat(y, starts) / sizes for y in (x, *lines)]


def _token_axis(axes: Axes, *, ticks: int) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(ticks))


def _legend(figure: Figure, lines: list, labels: list[str]) -> None:
    """Above the axes, where it covers no data."""
    columns = min(3, len(lines))
    figure.legend(lines, labels, loc="outside upper left", ncols=columns, columnspacing=2.0)


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    blank = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=blank)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg role="img" aria-label="{label}" {view.group()} style="stroke-linejoin: round">'
    svg = re.sub(r"<svg[^>]*>", head, svg, count=1)
    svg = re.sub(
        r' id="(?!m[0-9a-f]|p[0-9a-f])[^"]*"', "", svg
    )  # group names repeat between figures
    svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's own typeface
    svg = svg.replace("xlink:href", "href")
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()
