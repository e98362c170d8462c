"""Figures: what is drawn, in the page's colours, the same every time."""

import re

import numpy as np
import pytest

from rho1_jax.analysis import figures

TOKENS = np.arange(1.0, 11.0) * 1e5
CURVE = np.linspace(5.0, 4.0, 10)
SCORES = np.random.default_rng(0).normal(size=500)


def all_figures() -> list[str]:
    losses = {"all": CURVE, "selected": CURVE + 1, "unselected": CURVE - 1}
    return [
        figures.losses_over_tokens(TOKENS, losses, {k: x - 0.5 for k, x in losses.items()}),
        figures.heldout_over_tokens({"math": (TOKENS, CURVE)}, {"math": 3.0}),
        figures.score_histogram(SCORES, 0.1, SCORES > 0.3, label="excess loss, nats"),
        figures.precision_bars({"excess": (0.8, 0.5), "random": (0.5, 0.5)}, used="excess"),
    ]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def lines(svg: str, colour: str, *, dashed: bool) -> list[np.ndarray]:
    """Points [n, 2] of each drawn line of that colour (fills and legend strokes left out)."""
    found = []
    for d, style in re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="([^"]*)"', svg):
        if f"stroke: var(--{colour})" in style and ("dasharray" in style) == dashed:
            found.append(np.array(re.findall(r"[ML] (\S+) (\S+)", d), float))
    return found


def test_the_same_numbers_give_the_same_characters():
    assert all_figures() == all_figures()


def test_figures_refer_to_nothing_outside_and_use_only_the_pages_colours():
    for svg in all_figures():
        assert svg.startswith("<svg")
        assert svg.endswith("</svg>")
        assert "http" not in svg
        assert set(re.findall(r"url\((.)", svg)) <= {"#"}
        assert not re.search(r"#[0-9a-fA-F]{6}\b(?!\))", re.sub(r'(id|href)="[^"]*"', "", svg))
        assert "<style" not in svg
        assert "font-family" not in svg


def test_axes_carry_units():
    losses, heldout, histogram, precision = map(texts, all_figures())
    assert {"loss, nats per token", "training tokens seen"} <= set(losses)
    assert {"held-out loss, nats per token", "training tokens seen"} <= set(heldout)
    assert {"excess loss, nats", "tokens per bin, % of all"} <= set(histogram)
    assert "useful tokens among the selected, %" in precision


def test_one_panel_per_subset_and_no_reference_where_none_is_known():
    svg = figures.losses_over_tokens(TOKENS, {"all": CURVE}, {})
    assert "all tokens" in texts(svg)
    assert not {"selected tokens", "unselected tokens", "reference"} & set(texts(svg))
    assert [len(line) for line in lines(svg, "ink", dashed=False)] == [10]
    assert lines(svg, "ink", dashed=True) == []


def test_policy_is_solid_and_reference_dashed():
    svg = figures.losses_over_tokens(TOKENS, {"all": CURVE}, {"all": CURVE - 0.5})
    (policy,), (reference,) = (lines(svg, "ink", dashed=d) for d in (False, True))
    np.testing.assert_allclose(policy[:, 0], reference[:, 0], atol=1e-3)
    below = reference[:, 1] - policy[:, 1]  # downwards in SVG is up
    assert (below > 0).all()
    np.testing.assert_allclose(below, below[0], rtol=1e-3)


@pytest.mark.parametrize(("steps", "run"), [(1, 1), (160, 1), (161, 2), (1600, 10)])
def test_long_curves_are_means_over_runs(steps, run):
    assert figures.points_per_mean(steps) == run
    zigzag = np.where(np.arange(steps) % 2, 1.0, 3.0)
    means = {"all": np.full(steps, 2.0)}
    svg = figures.losses_over_tokens(np.arange(1.0, steps + 1), {"all": zigzag}, means)
    (line,), (mean,) = (lines(svg, "ink", dashed=d) for d in (False, True))
    assert len(line) == len(mean) == -(-steps // run)
    whole = steps // run
    if run > 1:
        np.testing.assert_allclose(line[:whole, 1], mean[:whole, 1], atol=1e-3)
    else:
        assert (np.abs(line[:, 1] - mean[:, 1]) > 1.0).all()


def test_every_domain_has_a_line_and_its_reference():
    curves = {f"domain {i}": (TOKENS, CURVE + i) for i in range(7)}
    svg = figures.heldout_over_tokens(curves, {"domain 1": 3.0})
    assert set(curves) <= set(texts(svg))
    assert len(lines(svg, "blue", dashed=False)) == 2  # six colours, then other markers
    assert len(lines(svg, "orange", dashed=True)) == 1
    assert "reference" in texts(svg)
    assert "reference" not in texts(figures.heldout_over_tokens(curves, {"elsewhere": 3.0}))


def test_threshold_stands_between_what_is_and_is_not_selected():
    def x(threshold):
        svg = figures.score_histogram(SCORES, threshold, None, label="loss, nats")
        (line,) = lines(svg, "ink", dashed=True)
        assert line[0, 0] == line[1, 0]
        return line[0, 0]

    assert x(1.0) - x(0.0) == pytest.approx(x(0.0) - x(-1.0), rel=1e-3)
    assert x(1.0) > x(0.0)


def test_histogram_of_known_truth_has_two_distributions_and_else_one():
    known = figures.score_histogram(SCORES, 0.1, SCORES > 0.3, label="x")
    assert {"useful tokens", "noise"} <= set(texts(known))
    unknown = figures.score_histogram(SCORES, 0.1, None, label="x")
    assert "all tokens" in texts(unknown)
    assert not {"useful tokens", "noise"} & set(texts(unknown))
    assert figures.score_histogram(np.full(5, 2.0), 2.0, None, label="x")  # no spread at all


def test_bars_are_ordered_labelled_and_the_runs_own_is_blue():
    values = {"random": (0.551, 0.552), "excess": (0.834, 0.552), "inverse": (0.28, 0.552)}
    svg = figures.precision_bars(values, used="excess")
    shown = [t for t in texts(svg) if t in (*values, "55.1", "83.4", "28.0")]
    assert shown == ["inverse", "random", "excess", "28.0", "55.1", "83.4"]
    assert svg.count("fill: var(--blue)") == 1
    assert "fill: var(--blue)" not in figures.precision_bars(values, used="combined")
    chance = lines(svg, "ink", dashed=False)
    assert len({line[0, 0] for line in chance}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (950.0, "950"),
        (1.2e4, "12k"),
        (999_900.0, "1M"),
        (1_228_800.0, "1.23M"),
        (8e10, "80B"),
    ],
)
def test_short_count(value, text):
    assert figures.short_count(value) == text
