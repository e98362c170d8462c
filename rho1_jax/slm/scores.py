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


class Signals(NamedTuple):
    """What a score may look at: float32 [B, S] in nats, aligned to the targets.

    The last three are None where the selection at hand does not read them.
    """

    loss: Float[Array, "B S"]
    valid: Bool[Array, "B S"]
    ref_loss: Any = None
    ref_entropy: Any = None
    key: Any = None  # a jax.random key, for the random control


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
    "inverse": inverse,
    "random": random,
}

# What each score reads beyond the policy's own loss.
NEEDS_REF_LOSS = frozenset({"excess", "reference", "inverse"})
NEEDS_REF_ENTROPY = frozenset({"entropy"})
