"""What scores read: a signal is a number for each target, [B, S], known by its name.

A new signal is one entry of SIGNALS and whatever computes it; scores (scores.py) ask for it by
naming an argument after it, and all else follows: what a stage keeps, what a batch carries, whether
a run needs a reference.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxtyping import Array, Int

from rho1_jax.slm import losses
from rho1_jax.slm.losses import Apply, Params

# Signals by name, and beside them "valid" bool and "targets" int, all [B, S]; "domain" [B, 1]; TOP
# [B, S, n].
Signals = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Signal:
    """source: who computes it. "policy" and "reference" are models, in the step or before it;
      "beforehand" is a stage before training; "chance" a draw in each step.
    cached: whether it can be kept beside the corpus and come with a batch (`Batch.cached`).
    dtype: in a batch.
    """

    source: str
    cached: bool
    dtype: str = "float32"


SIGNALS: dict[str, Signal] = {
    "loss": Signal("policy", cached=False),  # -log p(target), nats
    "ref_loss": Signal("reference", cached=True),  # the same of the reference
    "ref_entropy": Signal("reference", cached=True),  # of its prediction, nats
    "ref_top": Signal("reference", cached=True),  # log-probabilities of its n likeliest tokens
    "ref_top_ids": Signal("reference", cached=True, dtype="int32"),  # which they are
    "utility": Signal("beforehand", cached=True),  # select.utility; higher is better
    "noise": Signal("chance", cached=False),  # uniform in [0, 1)
}
TOP = ("ref_top", "ref_top_ids")  # for distillation; no score reads them
CACHED = tuple(name for name, signal in SIGNALS.items() if signal.cached)


def computed_by(source: str, names: Iterable[str] = tuple(SIGNALS)) -> frozenset[str]:
    """Those of the signals `names` that `source` computes."""
    return frozenset(name for name in names if SIGNALS[name].source == source)


def of_reference(
    apply: Apply,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    chunk_tokens: int,
    names: Collection[str],
    top: int = 0,
) -> dict[str, Array]:
    """ "ref_loss" [B, S] of the targets of rows [B, T = S+1] and, if among `names`, "ref_entropy";
    with `top` also TOP [B, S, top]."""
    hidden, head = apply(params, tokens[:, :-1])
    loss, entropy = losses.token_losses(
        hidden, head, tokens[:, 1:], chunk_tokens=chunk_tokens, entropy="ref_entropy" in names
    )
    found = {"ref_loss": loss} if entropy is None else {"ref_loss": loss, "ref_entropy": entropy}
    if top:
        likeliest = losses.top_log_probs(hidden, head, top, chunk_tokens=chunk_tokens)
        found |= dict(zip(TOP, likeliest, strict=True))
    return found
