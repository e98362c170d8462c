"""Per-token scores: how much a token is worth training on. Higher is kept first.

Notation (paper, section 2.2): `loss` is the policy's -log p(target), `ref_loss` the reference
model's, and their difference the excess loss. Scores rank tokens; no gradient flows through them
(`select` in selection.py stops it).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NGRAM = 4  # tokens of context, the target included, that `diversity` compares


class Signals(NamedTuple):
    """What a score may look at: float32 [B, S] in nats, aligned to the targets.

    All but the first two are None where the selection at hand does not read them.
    """

    loss: Float[Array, "B S"]
    valid: Bool[Array, "B S"]
    ref_loss: Any = None
    ref_entropy: Any = None
    key: Any = None  # a jax.random key, for the random control
    targets: Any = None  # int [B, S]
    utility: Any = None  # whatever was computed of the corpus beforehand, higher is better


def excess(s: Signals) -> Float[Array, "B S"]:
    """Excess loss l - r: what the policy has not learnt and the reference could."""
    return s.loss - s.ref_loss


def loss(s: Signals) -> Float[Array, "B S"]:
    """The policy's own loss l: the hardest tokens, learnable or not."""
    return s.loss


def reference(s: Signals) -> Float[Array, "B S"]:
    """-r: the tokens a reference finds easy (self-reference, section 3.4)."""
    return -s.ref_loss


def entropy(s: Signals) -> Float[Array, "B S"]:
    """-H_ref: the tokens where the reference is sure, whatever the target (section 3.4)."""
    return -s.ref_entropy


def middle(s: Signals) -> Float[Array, "B S"]:
    """-|l - median of l|: neither the easy tokens nor the hard ones.

    Middle-perplexity pruning (Marion et al. 2023, arXiv 2309.04564, there of whole documents), for
    tokens: the median is over the valid tokens that are scored together.
    """
    median = jnp.nanmedian(jnp.where(s.valid, s.loss, jnp.nan))
    return -jnp.abs(s.loss - median)


def diversity(s: Signals) -> Float[Array, "B S"]:
    """Minus how often the NGRAM tokens that end at the target came earlier among these rows.

    Many tokens tie at 0, and ties go to the earlier position: `combined` with another score.
    Told apart by a 32-bit hash, so that of a million tokens some hundred may be taken for repeats.
    """
    ahead = jnp.pad(s.targets + 1, ((0, 0), (NGRAM - 1, 0))).astype(jnp.uint32)
    grams = jnp.zeros(s.targets.shape, jnp.uint32)
    for i in range(NGRAM):
        grams = (grams ^ ahead[:, i : i + s.targets.shape[1]]) * jnp.uint32(2654435761)
        grams ^= grams >> 15
    grams = jnp.where(s.valid, grams, 0).reshape(-1)
    order = jnp.argsort(grams, stable=True)
    first = jnp.searchsorted(grams[order], grams[order], side="left")
    earlier = jnp.zeros_like(first).at[order].set(jnp.arange(grams.size) - first)
    return -earlier.reshape(s.targets.shape).astype(jnp.float32)


def utility(s: Signals) -> Float[Array, "B S"]:
    """A score that was computed beforehand (`select.utility`; training/utility.py)."""
    return s.utility


def inverse(s: Signals) -> Float[Array, "B S"]:
    """Control: the excess loss upside down."""
    return s.ref_loss - s.loss


def random(s: Signals) -> Float[Array, "B S"]:
    """Control: a fresh uniform draw for every token and step."""
    return jax.random.uniform(s.key, s.loss.shape)


def standardised(score: Float[Array, "B S"], valid: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Zero mean, unit variance over the valid tokens: scores of unlike units can be added."""
    n = jnp.maximum(valid.sum(), 1)
    mean = jnp.sum(score, where=valid) / n
    variance = jnp.sum(jnp.square(score - mean), where=valid) / n
    return (score - mean) * jax.lax.rsqrt(variance + 1e-12)


def combined(s: Signals, weights: dict[str, float]) -> Float[Array, "B S"]:
    """Weighted sum of standardised scores, for instance {"excess": 1.0, "entropy": 0.5}."""
    parts = [w * standardised(SCORES[name](s), s.valid) for name, w in weights.items()]
    return sum(parts[1:], parts[0])


SCORES: dict[str, Callable[[Signals], Array]] = {
    "excess": excess,
    "loss": loss,
    "reference": reference,
    "entropy": entropy,
    "middle": middle,
    "diversity": diversity,
    "utility": utility,
    "inverse": inverse,
    "random": random,
}

# What each score reads beyond the policy's own loss.
NEEDS_REF_LOSS = frozenset({"excess", "reference", "inverse"})
NEEDS_REF_ENTROPY = frozenset({"entropy"})
NEEDS_UTILITY = frozenset({"utility"})
