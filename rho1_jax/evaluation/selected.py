"""What a selection keeps, token by token, and how much of it is worth keeping."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rho1_jax.data.loader import Rows, ordered_batches
from rho1_jax.slm import scores
from rho1_jax.slm.scores import Signals
from rho1_jax.slm.selection import Selection, select
from rho1_jax.slm.step import Batch

TRUTH = ("tokens", "valid", "useful")
SIGNALS = ("loss", "valid", "ref_loss", "ref_entropy", "utility")


def sample(
    domains: Sequence[Rows],
    score_fns: Mapping[str, Callable[[Batch], Mapping[str, Any]]],
    *,
    rows_each: int,
    batch_size: int,
    put: Callable[[dict[str, np.ndarray]], Batch],
) -> dict[str, np.ndarray]:
    """The first `rows_each` rows of each domain, and what models make of them.

    score_fns: prefix -> function of a batch to {"ref_loss", "ref_entropy"} (training/scoring.py) of
    one model: "" for the policy, "ref_" for the reference; "utility" -> that of {"utility"}.
    Returns "tokens" [R, S+1], "valid" and (if all domains know it) "useful" [R, S], per model
    prefix + "loss" and prefix + "entropy", and "utility" where it is asked for [R, S].
    """
    parts = []
    for rows in domains:
        for batch in ordered_batches(
            rows, batch_size=batch_size, stop_row=min(rows_each, len(rows))
        ):
            placed, real = put(batch), batch["row"] >= 0
            part = {name: batch[name][real] for name in TRUTH if name in batch}
            for prefix, score_fn in score_fns.items():
                for name, x in score_fn(placed).items():
                    name = name.replace("ref_", prefix)
                    part[name] = np.asarray(x)[real]
            parts.append(part)
    shared = set.intersection(*(set(part) for part in parts))
    return {name: np.concatenate([part[name] for part in parts]) for name in shared}


def mark(sample: Mapping[str, np.ndarray], selection: Selection) -> dict[str, np.ndarray]:
    """Score and mask of a sample of tokens under `selection`, all of them competing as one batch.

    sample: "tokens" [R, S+1], "loss" and "valid" [R, S], and "ref_loss", "ref_entropy", "utility"
    where they are known. Returns "selected" bool [R, S] and, for a plain score, "score" [R, S].
    """
    signals = _signals(sample)
    out = {"selected": np.asarray(select(selection, signals))}
    if selection.score in scores.SCORES:
        out["score"] = np.asarray(scores.SCORES[selection.score](signals))
    return out


def precision_of_scores(
    sample: Mapping[str, np.ndarray], ratio: float
) -> dict[str, dict[str, float]]:
    """score name -> {"precision", "useful_share"}: of the tokens each score keeps, the share that
    the corpus knows to be useful, and that share among all tokens (what chance would give).

    sample: as for `mark`, plus "useful" bool [R, S]. Scores that lack their inputs are left out.
    """
    valid, useful = sample["valid"], sample["useful"]
    out = {}
    for name in scores.SCORES:
        selection = Selection(name, ratio, "batch")
        if selection.needs_ref_loss and "ref_loss" not in sample:
            continue
        if selection.needs_ref_entropy and "ref_entropy" not in sample:
            continue
        if selection.needs_utility and "utility" not in sample:
            continue
        kept = mark(sample, selection)["selected"]
        out[name] = {
            "precision": float(useful[kept].mean()),
            "useful_share": float(useful[valid].mean()),
        }
    return out


def _signals(sample: Mapping[str, Any]) -> Signals:
    arrays = {name: jnp.asarray(sample[name]) for name in SIGNALS if name in sample}
    targets = jnp.asarray(sample["tokens"][:, 1:])
    return Signals(**arrays, key=jax.random.key(0), targets=targets)
