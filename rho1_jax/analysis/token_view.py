"""Texts with the tokens marked that selective language modeling keeps (paper, figures 11-13).

    python -m rho1_jax.analysis.token_view --policy=MODEL --reference=MODEL TEXT --out=page.html

MODEL is a .gguf file or a run's folder. Without --reference, tokens are only coloured by loss.
Pages hold all they need: style, script and figures are inline, nothing is ever fetched.
"""

import argparse
import dataclasses
import functools
import html
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.slm import losses, selection
from rho1_jax.training.checkpoint import load_model

Model = tuple[llama.Params, llama.LlamaConfig, tokenizer.Tokenizer]
WINDOW = 512  # targets per window
CHUNK_TOKENS = 128  # targets whose logits exist at once

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

STYLE = """
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums lining-nums; }
main { max-width: 44rem; margin: 0 auto; padding: 3.5rem 1.25rem 6rem; }
h1 { font-size: 1.75rem; font-weight: 600; letter-spacing: -.015em; line-height: 1.2;
  margin: 0 0 1rem; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.125rem; font-weight: 600; margin: 3.25rem 0 .75rem; }
h3 { font-size: .9375rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
p { margin: .5rem 0; text-wrap: pretty; }
.lede { font-size: 1.0625rem; } .own { font-weight: 600; }
.note, figcaption, caption { color: var(--muted); font-size: .875rem; line-height: 1.5; }
figure { margin: 1rem 0 0; } figure + figure { margin-top: 2.25rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 40rem; overflow: visible; }
figcaption { margin-top: .5rem; max-width: 40rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: 1rem 1.5rem; margin: 1.5rem 0 0; padding: 1rem 0; border: solid var(--rule);
  border-width: 1px 0; }
.facts dt { font-size: .8125rem; }
.facts dd { margin: 0; font-weight: 500; overflow-wrap: anywhere; }
.wide, details { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .875rem; min-width: 100%; }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; }
th, td { text-align: right; padding: .3rem 0 .3rem 1.25rem; border-bottom: 1px solid var(--rule);
  white-space: nowrap; font-weight: 400; }
thead th, .plain th, summary, dt { color: var(--muted); }
thead tr:not(:last-child) th { border-color: transparent; padding-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.plain th { vertical-align: top; } summary { cursor: pointer; }
pre { font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; padding: 1rem;
  background: var(--panel); border-radius: 6px; overflow-x: auto; }
.passage { margin-top: 1.5rem; } .passage header .note { flex: 1 1 auto; }
.passage header { display: flex; flex-wrap: wrap; gap: .125rem 1.25rem; align-items: baseline; }
.passage label { color: var(--muted); font-size: .8125rem; cursor: pointer; white-space: nowrap; }
.passage input { accent-color: var(--orange); margin: 0 .35rem 0 0; vertical-align: -1px; }
.text { margin-top: .5rem; padding: 1rem 1.125rem; background: var(--panel); border-radius: 6px;
  font-family: Charter, "Bitstream Charter", "Iowan Old Style", Cambria, Georgia, serif;
  line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { padding: .1em 0; border-radius: 2px; }
.text .on { color: var(--blue); background: color-mix(in srgb, var(--blue) 13%, transparent); }
.text .nl::before { content: "\\21B5"; opacity: .4; font-size: .8em; }
.text .part::before { content: "\\00B7"; opacity: .5; }
.passage:has(input:checked) .text span { background:
  color-mix(in srgb, var(--orange) calc(var(--q, 0) * .5%), transparent); }
.passage:has(input:checked) .text .on { color: inherit; box-shadow: inset 0 -2px var(--blue); }
.text span[data-v]:hover { outline: 1px solid var(--muted); }
#tip { position: fixed; z-index: 1; margin: 0; padding: .5rem .75rem; pointer-events: none;
  background: var(--paper); border: 1px solid var(--rule); border-radius: 6px;
  box-shadow: 0 4px 16px rgb(0 0 0 / .16); font-size: .8125rem; line-height: 1.45;
  display: grid; grid-template-columns: auto auto; gap: 0 1rem; max-width: 20rem; }
#tip[hidden] { display: none; }
#tip dd { margin: 0; text-align: right; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 36rem) { main { padding: 2rem 1rem 4rem; }
  figure svg text { font-size: 10px !important; } }
"""

SCRIPT = """
const tip = document.getElementById("tip");
const names = ["policy loss", "reference loss", "score", "rank percentile"];
const show = text =>
  text.replace(/\\n/g, "\\u21b5").replace(/ /g, "\\u2423") || "part of a character";
const item = (tag, textContent) => Object.assign(document.createElement(tag), { textContent });
document.addEventListener("pointerover", event => {
  const token = event.target.closest?.("[data-v]");
  tip.hidden = !token;
  if (!token) return;
  const rows = [["token", show(token.textContent)]];
  token.dataset.v.split(" ").forEach((v, i) => { if (v !== "-") rows.push([names[i], v]); });
  tip.replaceChildren(...rows.flatMap(([k, v]) => [item("dt", k), item("dd", v)]));
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.top = (below ? box.bottom + 6 : box.top - 6 - tip.offsetHeight) + "px";
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
});
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """One self-contained HTML page.

    Args: the title (plain text), and sections as (heading in plain text or "", body in HTML).
    A content security policy forbids every request, so that nothing can ever be fetched.
    """
    themes = ["".join(f"--{k}:{v[i]};" for k, v in PALETTE.items()) for i in (0, 1)]
    heading = html.escape(title)
    body = "\n".join(
        f"<section>{f'<h2>{html.escape(name)}</h2>' if name else ''}{content}</section>"
        for name, content in sections
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<link rel="icon" href="data:,">
<style>
:root {{ {themes[0]} }}
@media (prefers-color-scheme: dark) {{ :root {{ {themes[1]} }} }}
{STYLE.strip()}
</style>
<main>
<h1>{heading}</h1>
{body}
</main>
<dl id="tip" hidden></dl>
<script>{SCRIPT}</script>
</html>
"""


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Writes `page(title, sections)`; InputError if there is no writing to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(title, sections), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another.") from None


def facts(items: Sequence[tuple[str, str]]) -> str:
    """A row of small facts, (name, value) in plain text, as HTML."""
    cells = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in items)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def passage_html(
    pieces: Sequence[str],
    loss: Float[Array | np.ndarray, " n"],
    ref_loss: Float[Array | np.ndarray, " n"] | None,
    score: Float[Array | np.ndarray, " n"] | None,
    selected: Bool[Array | np.ndarray, " n"],
    *,
    title: str = "",
) -> str:
    """A passage with its selected tokens marked; the values of each token show under the pointer.

    Args: the text of each token (they join to the passage; "" for a token that is only a part of a
    character), its losses in nats (NaN: it has none and is left plain), its score (None: colour
    and rank go by the loss, and nothing is marked that `selected` does not mark).
    Raises: ValueError if the lengths differ.
    """
    rank = _rank_percentile(np.asarray(loss if score is None else score))
    values = [_three_decimals(x, len(pieces)) for x in (loss, ref_loss, score)]
    tokens = zip(pieces, *values, rank.tolist(), np.asarray(selected).tolist(), strict=True)
    spans = itertools.starmap(_span, tokens)
    n_valid = int(np.isfinite(rank).sum())
    note = f"{int(np.sum(selected)):,} of {n_valid:,} tokens selected" if np.any(selected) else ""
    by = "score" if score is not None else "loss"
    checked = "" if np.any(selected) else " checked"
    return (
        f'<article class="passage"><header><h3>{html.escape(title)}</h3>'
        f'<span class="note">{note}</span>'
        f'<label><input type="checkbox"{checked}>colour by {by}</label></header>'
        f'<div class="text">{"".join(spans)}</div></article>'
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


def _span(piece: str, loss: str, ref_loss: str, score: str, rank: float, selected: bool) -> str:
    marks = ["on"] * selected + ["nl"] * ("\n" in piece) + ["part"] * (not piece)
    attributes = f' class="{" ".join(marks)}"' if marks else ""
    if math.isfinite(rank):
        attributes += f' style="--q:{rank:.0f}" data-v="{loss} {ref_loss} {score} {rank:.0f}"'
    return f"<span{attributes}>{html.escape(piece)}</span>"


@functools.partial(jax.jit, static_argnames="config")
def _window_losses(
    params: llama.Params, row: Int[Array, "1 S"], *, config: llama.LlamaConfig
) -> Float[Array, "1 S-1"]:
    hidden, head = llama.apply(params, row[:, :-1], config=config)
    return losses.token_losses(hidden, head, row[:, 1:], chunk_tokens=CHUNK_TOKENS)[0]


def text_losses(
    params: llama.Params, config: llama.LlamaConfig, ids: Int[np.ndarray, " n"], *, label: str
) -> Float[np.ndarray, " n"]:
    """Loss in nats of each token of a text, computed in float32; NaN for the first, which has none.

    Windows of up to WINDOW targets overlap by one token, so every other token has a loss; the
    context starts anew with each window.
    """
    config = dataclasses.replace(config, dtype="float32")
    width = min(WINDOW, ids.size - 1)
    out = np.full(ids.size, np.nan, np.float32)
    starts = tqdm(range(0, ids.size - 1, width), label, unit="window", leave=False)
    with jax.default_matmul_precision("float32"):
        for start in starts:
            row = ids[start : start + width + 1]
            padded = np.pad(row, (0, width + 1 - row.size))[None]  # causal: padding changes nothing
            loss = np.asarray(_window_losses(params, padded, config=config))[0]
            out[start + 1 : start + row.size] = loss[: row.size - 1]
    return out


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; InputError if it is absent, not text, or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a text file.") from None
    if not text.strip():
        raise InputError(f"{path} holds no text: give a file with at least a few words.")
    return text


def mark_text(
    text: str, policy: Model, reference: Model | None, *, ratio: float
) -> tuple[str, dict[str, str]]:
    """The text as a marked passage (HTML), and per model a summary of its losses.

    Marked are the `ratio` of tokens with the highest excess loss; none without a reference.
    Raises: InputError for a ratio outside (0, 1], a reference whose vocabulary is not the policy's,
    and a text of a single token.
    """
    rule = selection.Selection(score="excess", ratio=ratio, scope="sequence")
    if reference:
        tokenizer.require_same(policy[2], reference[2])
    encoded = policy[2].encode([text])[0]
    if encoded.ids.size < 2:
        raise InputError("The text is a single token, and the first has no loss: give more text.")

    n_bytes = len(text[encoded.starts[1] :].encode())
    loss = text_losses(policy[0], policy[1], encoded.ids, label="policy")
    summary = {"policy": _summary(loss, n_bytes)}
    ref_loss, score, selected = None, None, np.zeros(loss.shape, bool)
    if reference:
        ref_loss = text_losses(reference[0], reference[1], encoded.ids, label="reference")
        summary["reference"] = _summary(ref_loss, n_bytes)
        score = loss - ref_loss
        rows = [jnp.asarray(x[None, 1:]) for x in (loss, ~selected, ref_loss)]
        selected[1:] = selection.select(rule, selection.Signals(*rows))[0]

    cuts = [0, *encoded.starts[1:].tolist(), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    return passage_html(pieces, loss, ref_loss, score, selected), summary


def _summary(loss: np.ndarray, n_bytes: int) -> str:
    mean, total = np.nanmean(loss, dtype=np.float64), np.nansum(loss, dtype=np.float64)
    return f"{mean:.4f} nats per token, {total / math.log(2.0) / n_bytes:.4f} bits per byte"


def _introduction(args: argparse.Namespace, summary: Mapping[str, str]) -> str:
    marked = (
        f"Blue: the {args.ratio:.0%} of this text's tokens with the highest excess loss (policy "
        "minus reference), which selective language modeling would train on."
    )
    only_loss = "No reference model was given, so nothing is marked; the colour shows the loss."
    note = f"Point at a token for its values, in nats. Context starts anew every {WINDOW} tokens."
    named = {"policy": args.policy, "reference": args.reference}
    items = [(name, f"{named[name].name}: {values}") for name, values in summary.items()]
    lede = marked if args.reference else only_loss
    return f'<p class="lede">{lede}</p><p class="note">{note}</p>{facts(items)}'


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser("token_view", description="A text with its tokens marked.")
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("--policy", type=Path, required=True, help="a .gguf file or a run's folder")
    parser.add_argument("--reference", type=Path, help="likewise; the same vocabulary")
    parser.add_argument("--ratio", type=float, default=0.6, help="share of tokens to select")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    args = parser.parse_args(argv)
    try:
        text = read_text(args.text)
        policy = load_model(args.policy)
        reference = load_model(args.reference) if args.reference else None
        passage, summary = mark_text(text, policy, reference, ratio=args.ratio)
        sections = [("", _introduction(args, summary)), ("", passage)]
        write_page(args.out, args.text.name, sections)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"{name}: {values}" for name, values in summary.items()))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
