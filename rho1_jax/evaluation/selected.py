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
    one model: "" for the policy, "ref_" for the reference. Returns "tokens" [R, S+1], "valid" and
    (if all domains know it) "useful" [R, S], and per model prefix + "loss", prefix + "entropy" [R,
    S].
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
                    part[prefix + name.removeprefix("ref_")] = np.asarray(x)[real]
            parts.append(part)
    shared = set.intersection(*(set(part) for part in parts))
    return {name: np.concatenate([part[name] for part in parts]) for name in shared}


def mark(sample: Mapping[str, np.ndarray], selection: Selection) -> dict[str, np.ndarray]:
    """Score and mask of a sample of tokens under `selection`, all of them competing as one batch.

    sample: "loss" and "valid" [R, S], and "ref_loss", "ref_entropy" where there is a reference.
    Returns
    "selected" bool [R, S] and, for a plain score, "score" float [R, S].
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
        kept = mark(sample, selection)["selected"]
        out[name] = {
            "precision": float(useful[kept].mean()),
            "useful_share": float(useful[valid].mean()),
        }
    return out


def _signals(sample: Mapping[str, Any]) -> Signals:
    arrays = {
        name: jnp.asarray(sample[name])
        for name in ("loss", "valid", "ref_loss", "ref_entropy")
        if name in sample
    }
    return Signals(**arrays, key=jax.random.key(0))
