"""What a selection keeps, token by token, and how much of it is worth keeping."""

import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rho1_jax import files
from rho1_jax.data.loader import Rows, batches_of
from rho1_jax.errors import InputError
from rho1_jax.slm import scores
from rho1_jax.slm.selection import Selection, select
from rho1_jax.slm.signals import SIGNALS, Signals
from rho1_jax.slm.step import Batch

TRUTH = ("tokens", "valid", "useful")


def sample(
    domains: Sequence[Rows],
    score_fns: Mapping[str, Callable[[Batch], Mapping[str, Any]]],
    *,
    row_ids: Sequence[np.ndarray],
    batch_size: int,
    put: Callable[[dict[str, np.ndarray]], Batch],
    numbers: Sequence[int] = (),
    known: Sequence[Mapping[str, np.ndarray]] = (),
) -> dict[str, np.ndarray]:
    """The rows row_ids of each domain, and what models make of them.

    score_fns: prefix -> function of a batch to {"ref_loss", "ref_entropy"} (training/scoring.py) of
    one model: "" for the policy, "ref_" for the reference; "utility" -> that of {"utility"}.
    numbers: of the domains in `Selection.domains`, for "domain" [R].
    known: of each domain what is known of its rows beforehand, such as "ref_loss" [n_rows, S].
    Returns "tokens" [R, S+1], "valid" and (if all domains know it) "useful" [R, S], per model
    prefix + "loss" and prefix + "entropy", and "utility" where it is asked for [R, S].
    """
    parts = []
    for rows, ids, number, values in itertools.zip_longest(domains, row_ids, numbers, known):
        for batch in batches_of(rows, ids, batch_size=batch_size):
            placed, real = put(batch), batch["row"] >= 0
            part = {name: batch[name][real] for name in TRUTH if name in batch}
            for name, x in (values or {}).items():
                part[name] = x[batch["row"][real]].astype(np.float32)
            if number is not None:
                part["domain"] = np.full(real.sum(), number, np.int32)
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
    where they are known; "domain" [R] where the selection has domains with ratios. Returns
    "selected" bool [R, S] and, for a plain score, "score" [R, S].
    """
    signals = _signals(sample)
    out = {"selected": np.asarray(select(selection, signals))}
    if selection.reads == (selection.score,):
        out["score"] = np.asarray(scores.score(selection.score, signals))
    return out


def precision_of_scores(
    sample: Mapping[str, np.ndarray], ratio: float, more: Iterable[str] = ()
) -> dict[str, dict[str, float]]:
    """score name -> {"precision", "useful_share"}: of the tokens each score keeps, the share that
    the corpus knows to be useful, and that share among all tokens (what chance would give).

    sample: as for `mark`, plus "useful" bool [R, S]. Scores that lack their inputs are left out.
    more: scores beside those of scores.SCORES.
    """
    valid, useful = sample["valid"], sample["useful"]
    out = {}
    for name in dict.fromkeys((*scores.SCORES, *more)):
        selection = Selection(name, ratio, "batch")
        if selection.needs - {"noise"} - sample.keys():
            continue
        kept = mark(sample, selection)["selected"]
        out[name] = {
            "precision": float(useful[kept].mean()),
            "useful_share": float(useful[valid].mean()),
        }
    return out


def _signals(sample: Mapping[str, Any]) -> Signals:
    known = {name: jnp.asarray(sample[name]) for name in ("valid", *SIGNALS) if name in sample}
    known["targets"] = jnp.asarray(sample["tokens"][:, 1:])
    if "domain" in sample:
        known["domain"] = jnp.asarray(sample["domain"])[:, None]
    return known | {"noise": jax.random.uniform(jax.random.key(0), known["valid"].shape)}


def load_sample(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a samples.npz; InputError if it is damaged."""
    advice = "delete it, and the stage evaluate makes it again"
    files.require_sealed(path, advice)
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): {advice}.") from error
