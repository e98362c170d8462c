"""Variants of the method side by side: each against CLM, from the same seeds and held-out rows."""

from collections.abc import Container, Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from experiments.lab import results
from experiments.lab.results import BASELINE, COLORS, Runs
from experiments.lab.study import Study

LINEAR = 0.2  # nats: the axis of differences is logarithmic beyond


def compare(this: Study, variants: Mapping[str, Mapping[str, Any]], text: str) -> None:
    """Runs and writes a whole experiment: the controls of Study.methods, then the variants.

    variants: name -> changes to SLM's config. text: Markdown that goes between table and figure.
    """
    configs: dict[tuple[str, int], ConfigDict] = {}
    for seed in range(this.seeds):
        configs |= {(name, seed): c for name, c in this.methods(seed).items()}
        configs |= {(name, seed): this.config(seed, v) for name, v in variants.items()}
    runs = this.run(configs)
    domains = [*this.targets, *this.corpus]
    n_lines = len(results.methods(runs)) - 1
    fig, panels = plt.subplots(
        1, len(domains), figsize=(2.0 + 2.6 * len(domains), 0.9 + 0.27 * n_lines),
        layout="constrained", squeeze=False, sharey=True,
    )  # fmt: skip
    for axes, domain in zip(panels[0], domains, strict=True):
        draw_differences(axes, runs, domain, variants)
    parts = [results.comparison(runs, domains), text, results.save(this, fig)]
    results.write(this, runs, results.rows(runs), "\n\n".join(parts))


def draw_differences(axes: Axes, runs: Runs, domain: str, variants: Container[str]) -> None:
    """Held-out loss minus the baseline's, with 95 % intervals: blue dots variants, black squares
    controls."""
    names = [name for name in results.methods(runs) if name != BASELINE]
    for place, name in enumerate(names):
        value = results.loss(runs, name, domain, minus=BASELINE)
        color, marker = (COLORS[0], "o") if name in variants else (COLORS[1], "s")
        axes.plot([value.low, value.high], [place, place], color=color, lw=1.6)
        axes.plot(value.estimate, place, marker, color=color, ms=5)
    axes.axvline(0.0, color="0.5", lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=LINEAR)  # the inverse selection is far off
    axes.set_xticks([-1, -LINEAR, 0, LINEAR, 1], ["-1", f"-{LINEAR}", "0", f"{LINEAR}", "1"])
    axes.margins(x=0.08)
    axes.set_xlabel(f"loss minus {BASELINE}'s (nats per token;\nlinear up to {LINEAR})")
    axes.set_title(domain, fontsize=10)
    axes.grid(axis="x", lw=0.4, color="0.85")
    axes.set_axisbelow(True)
