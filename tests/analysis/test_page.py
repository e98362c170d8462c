"""Pages and the marked passages on them: escaped, self-contained, in both themes."""

import math
import re

import jinja2
import numpy as np
import pytest

from rho1_jax.analysis import page
from rho1_jax.errors import InputError

TEXT = "The farmer has 35 acres.\n\nUsing 2 acres gives 2 × 1.5 = 3 tonnes & more 🌽.\n"
NAN = math.nan


def page_of(html, title="", items=()):
    return page.render("text.html", title=title, lede="", note="", items=items, passage=html)


def passage(pieces, loss, ref_loss=None, selected=None, **kwargs):
    loss = np.array(loss, np.float32)
    ref_loss = None if ref_loss is None else np.array(ref_loss, np.float32)
    score = None if ref_loss is None else loss - ref_loss
    selected = np.zeros(loss.shape, bool) if selected is None else np.array(selected)
    return page.passage(pieces, loss, ref_loss, score, selected, **kwargs)


def test_text_is_escaped(tokens_of):
    pieces = ["<script>", 'alert("1")', "</script>", " & "]
    html = passage(pieces, [NAN, 1.0, 2.0, 3.0], title="<b>")
    assert "<script" not in html
    assert "<b>" not in html
    assert [text for text, *_ in tokens_of(html)] == pieces
    whole = page_of(html, title="<script>alert(1)</script>", items=[("<i>", "<u>")])
    assert "<script>alert" not in whole
    assert "<i>" not in whole
    assert "<u>" not in whole


def test_marks_exactly_the_selected_and_keeps_the_text(tokens_of):
    rng = np.random.default_rng(0)
    pieces = re.findall(r"\s|\w+|[^\w\s]", TEXT)
    for _ in range(5):
        loss = rng.gamma(2.0, 1.5, len(pieces))
        selected = rng.random(len(pieces)) < 0.5
        found = tokens_of(passage(pieces, loss, loss[::-1], selected))
        assert "".join(text for text, *_ in found) == TEXT
        assert [bool("on" in classes) for _, classes, _ in found] == selected.tolist()
        assert [bool("nl" in classes) for _, classes, _ in found] == [p == "\n" for p in pieces]


def test_hover_values_are_the_losses_the_score_and_its_rank(tokens_of):
    html = passage(
        ["a", "b", "c", "d"],
        [NAN, 1.5, 4.0, 0.5],
        [NAN, 0.25, 1.0, 2.0],
        [False, False, True, False],
    )
    assert [v for *_, v in tokens_of(html)] == [
        None,
        "1.500 0.250 1.250 50",
        "4.000 1.000 3.000 100",
        "0.500 2.000 -1.500 0",
    ]
    assert "1 of 3 tokens selected" in html
    assert "colour by score" in html


def test_tied_scores_share_a_rank(tokens_of):
    values = [v for *_, v in tokens_of(passage("abc", [1.0, 1.0, 2.0]))]
    assert [v.split()[-1] for v in values] == ["0", "0", "100"]


def test_without_a_reference_the_colour_is_the_loss_and_shown_at_once(tokens_of):
    html = passage(["a", "b"], [2.0, 1.0])
    assert [v for *_, v in tokens_of(html)] == ["2.000 - - 100", "1.000 - - 0"]
    assert '<input type="checkbox" checked>colour by loss' in html
    assert "selected</span>" not in html


def test_a_token_that_is_part_of_a_character_stays_visible(tokens_of):
    (_, whole, _), (_, part, _) = tokens_of(passage(["🌽", ""], [1.0, 2.0]))
    assert "part" in part
    assert "part" not in whole


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        passage(["a", "b"], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])


def test_page_fetches_nothing_and_reads_in_both_themes(assert_self_contained):
    whole = page_of(passage(["a"], [1.0]), title="Title & more")
    assert_self_contained(whole)
    assert "<title>Title &amp; more</title>" in whole
    assert "<h1>Title &amp; more</h1>" in whole
    light, dark = re.findall(r":root \{ ([^}]*) \}", whole)
    names = set(re.findall(r"var\((--[\w-]+)", whole)) - {"--q"}
    assert names <= set(re.findall(r"(--[\w-]+):", light))
    assert re.findall(r"(--\w+):", light) == re.findall(r"(--\w+):", dark)
    assert "prefers-color-scheme: dark" in whole


def written(path, template="text.html", **values):
    plain = {"title": "", "lede": "", "note": "", "items": (), "passage": ""}
    page.write(path, template, **plain | values)


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be written .Is a directory"):
        written(tmp_path)


def test_a_page_is_whole_or_not_there(tmp_path):
    written(tmp_path / "new" / "a.html", lede="naïve & whole")
    assert "naïve &amp; whole" in (tmp_path / "new" / "a.html").read_text(encoding="utf-8")
    with pytest.raises(jinja2.UndefinedError):
        page.write(tmp_path / "b.html", "text.html", title="no values")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.html"]


def test_a_template_of_ones_own_stands_on_the_same_page(tmp_path):
    (tmp_path / "mine.html").write_text(
        '{% extends "page.html" %}{% block main %}{{ said }}{% endblock %}'
    )
    whole = page.render("mine.html", folder=tmp_path, title="T", said="<b>")
    assert whole.startswith("<!doctype html>")
    assert "&lt;b&gt;" in whole


def test_a_passage_is_one_stop_of_the_tab_key_and_says_what_keys_do():
    html = passage(["a", "b"], [1.0, 2.0], title="Row & 1")
    assert html.count('tabindex="0"') == 1
    assert 'aria-label="Row &amp; 1: arrow keys' in html
    assert "tabindex" not in passage(["a"], [NAN])  # there is nothing to come to
