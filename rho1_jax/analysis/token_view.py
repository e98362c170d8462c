"""Texts with the tokens marked that selective language modeling keeps (paper, figures 11-13).

    python -m rho1_jax.analysis.token_view --policy=MODEL --reference=MODEL TEXT --out=page.html

TEXT is a UTF-8 file, MODEL a .gguf file or a run's folder. --ratio=0.6 of the tokens are marked;
without --reference, tokens are only coloured by loss.
"""

import functools
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from markupsafe import Markup
from tqdm import tqdm

from rho1_jax import command_line
from rho1_jax.analysis import page
from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.slm import losses, selection
from rho1_jax.training.checkpoint import load_model

Model = tuple[llama.Params, llama.Architecture, tokenizer.Tokenizer]
WINDOW = 512  # targets per window
CHUNK_TOKENS = 128  # targets whose logits exist at once


@functools.partial(jax.jit, static_argnames="config")
def _window_losses(
    params: llama.Params, row: Int[Array, "1 S"], *, config: llama.LlamaConfig
) -> Float[Array, "1 S-1"]:
    hidden, head = llama.apply(params, row[:, :-1], config=config)
    return losses.token_losses(hidden, head, row[:, 1:], chunk_tokens=CHUNK_TOKENS)[0]


def text_losses(
    params: llama.Params, shape: llama.Architecture, ids: Int[np.ndarray, " n"], *, label: str
) -> Float[np.ndarray, " n"]:
    """Loss in nats of each token of a text, computed in float32; NaN for the first, which has none.

    Windows of up to WINDOW targets overlap by one token, so every other token has a loss; the
    context starts anew with each window.
    """
    config = shape.computed()
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
) -> tuple[Markup, dict[str, str]]:
    """The text as a marked passage, and per model a summary of its losses.

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
        known = {"loss": loss, "valid": ~selected, "ref_loss": ref_loss}
        signals = {name: jnp.asarray(x[None, 1:]) for name, x in known.items()}
        selected[1:] = selection.select(rule, signals)[0]

    cuts = [0, *encoded.starts[1:].tolist(), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    return page.passage(pieces, loss, ref_loss, score, selected), summary


def _summary(loss: np.ndarray, n_bytes: int) -> str:
    mean, total = np.nanmean(loss, dtype=np.float64), np.nansum(loss, dtype=np.float64)
    return f"{mean:.4f} nats per token, {total / math.log(2.0) / n_bytes:.4f} bits per byte"


def _introduction(args: SimpleNamespace, summary: Mapping[str, str]) -> dict[str, Any]:
    marked = (
        f"Blue: the {args.ratio:.0%} of this text's tokens with the highest excess loss (policy "
        "minus reference), which selective language modeling would train on."
    )
    only_loss = "No reference model was given, so nothing is marked; the colour shows the loss."
    named = {"policy": args.policy, "reference": args.reference}
    return {
        "lede": marked if args.reference else only_loss,
        "note": "Point at a token for its values, in nats; with the keyboard, tab to the passage "
        f"and use the arrow keys. Context starts anew every {WINDOW} tokens.",
        "items": [(name, f"{named[name].name}: {values}") for name, values in summary.items()],
    }


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> None:
    options = {"policy": Path, "reference": Path, "ratio": 0.6, "out": Path}
    needs = {"policy": "give a .gguf file or a run's folder", "out": "name the page to write"}
    args = command_line.parse(argv, options, required=needs, words=("TEXT",))
    text_file = Path(args.words[0])
    text = read_text(text_file)
    policy = load_model(args.policy)
    reference = load_model(args.reference) if args.reference else None
    passage, summary = mark_text(text, policy, reference, ratio=args.ratio)
    shown = _introduction(args, summary)
    page.write(args.out, "text.html", title=text_file.name, passage=passage, **shown)
    print("\n".join(f"{name}: {values}" for name, values in summary.items()))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
