"""Per-token scores: how much a token is worth training on. Higher is kept first.

Notation (paper, section 2.2): `loss` is the policy's -log p(target), `ref_loss` the reference
model's, and their difference the excess loss. A score is a function of signals (signals.py), and
the names of its arguments say which: [b, S] of the tokens that compete with each other, aligned to
the targets. Scores rank tokens; no gradient flows through them (`select` in selection.py stops it).
"""

import inspect
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rho1_jax.slm import outside
from rho1_jax.slm.signals import SIGNALS, Signals

NGRAM = 4  # tokens of context, the target included, that `diversity` compares


def excess(loss: Float[Array, "b S"], ref_loss: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """Excess loss l - r: what the policy has not learnt and the reference could."""
    return loss - ref_loss


def loss(loss: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """The policy's own loss l: the hardest tokens, learnable or not."""
    return loss


def reference(ref_loss: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """-r: the tokens a reference finds easy (self-reference, section 3.4)."""
    return -ref_loss


def entropy(ref_entropy: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """-H_ref: the tokens where the reference is sure, whatever the target (section 3.4)."""
    return -ref_entropy


def middle(loss: Float[Array, "b S"], valid: Bool[Array, "b S"]) -> Float[Array, "b S"]:
    """-|l - median of l|: neither the easy tokens nor the hard ones.

    Middle-perplexity pruning (Marion et al. 2023, arXiv 2309.04564, there of whole documents), for
    tokens: the median is over the valid tokens that compete.
    """
    median = jnp.nanmedian(jnp.where(valid, loss, jnp.nan))
    return -jnp.abs(loss - median)


def diversity(targets: Int[Array, "b S"], valid: Bool[Array, "b S"]) -> Float[Array, "b S"]:
    """Minus how often the NGRAM tokens that end at the target came earlier among these rows.

    Many tokens tie at 0, and ties go to the earlier position: `combined` with another score.
    Told apart by a 32-bit hash, so that of a million tokens some hundred may be taken for repeats.
    """
    ahead = jnp.pad(targets + 1, ((0, 0), (NGRAM - 1, 0))).astype(jnp.uint32)
    grams = jnp.zeros(targets.shape, jnp.uint32)
    for i in range(NGRAM):
        grams = (grams ^ ahead[:, i : i + targets.shape[1]]) * jnp.uint32(2654435761)
        grams ^= grams >> 15
    grams = jnp.where(valid, grams, 0).reshape(-1)
    order = jnp.argsort(grams, stable=True)
    first = jnp.searchsorted(grams[order], grams[order], side="left")
    earlier = jnp.zeros_like(first).at[order].set(jnp.arange(grams.size) - first)
    return -earlier.reshape(targets.shape).astype(jnp.float32)


def utility(utility: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """A score that was computed beforehand (`select.utility`; training/utility.py)."""
    return utility


def inverse(loss: Float[Array, "b S"], ref_loss: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """Control: the excess loss upside down."""
    return ref_loss - loss


def random(noise: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """Control: a fresh uniform draw for every token and step."""
    return noise


SCORES: dict[str, Callable[..., Array]] = {
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


def function(name: str) -> Callable[..., Array]:
    """The score of that name: one of SCORES, or `package.module:function` (outside.py)."""
    return SCORES[name] if name in SCORES else outside.load(name)


def needs(name: str) -> frozenset[str]:
    """The signals that a score reads."""
    read = inspect.signature(function(name)).parameters
    return frozenset(argument for argument in read if argument in SIGNALS)


def score(name: str, signals: Signals) -> Float[Array, "b S"]:
    """The score `name` of these tokens."""
    read = inspect.signature(function(name)).parameters
    return function(name)(**{argument: signals[argument] for argument in read})


def combined(parts: Iterable[tuple[str, float]], signals: Signals) -> Float[Array, "b S"]:
    """Weighted sum of standardised scores, for instance (("excess", 1.0), ("entropy", 0.5))."""
    terms = [w * standardised(score(name, signals), signals["valid"]) for name, w in parts]
    return sum(terms[1:], terms[0])


def standardised(score: Float[Array, "b S"], valid: Bool[Array, "b S"]) -> Float[Array, "b S"]:
    """Zero mean, unit variance over the valid tokens: scores of unlike units can be added."""
    n = jnp.maximum(valid.sum(), 1)
    mean = jnp.sum(score, where=valid) / n
    variance = jnp.sum(jnp.square(score - mean), where=valid) / n
    return (score - mean) * jax.lax.rsqrt(variance + 1e-12)
