"""How the loss of each token moves while a model trains (paper, section 2.1 and appendix D).

`losses` is always [C, N]: the loss in nats of each of N tokens of a fixed text at C checkpoints.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rho1_jax.errors import InputError

# High or low loss at the start -> at the end; the index is the category.
CATEGORIES = ("H->H", "L->H", "H->L", "L->L")
CHANGE = 0.2  # nats between the ends of the fitted line: the paper's threshold


class Lines(NamedTuple):
    """Least-squares lines, one for each token: [N] each."""

    start: Float[np.ndarray, " N"]  # fitted loss at the first checkpoint
    end: Float[np.ndarray, " N"]  # and at the last
    residual: Float[np.ndarray, " N"]  # root mean square distance from the line


def fit(losses: Float[np.ndarray, "C N"], steps: Int[np.ndarray, " C"]) -> Lines:
    """The line through each token's losses over `steps`; InputError below two checkpoints."""
    if len(set(steps.tolist())) < 2:
        raise InputError(f"A trend needs at least two checkpoints, not those at steps {steps}.")
    x = steps - steps.mean()
    slope = (x @ losses) / (x @ x)
    mean = losses.mean(axis=0)
    start, end = mean + slope * x[0], mean + slope * x[-1]
    # Sum of squares about the line: about the mean, less what the slope explains.
    about_mean = np.einsum("cn,cn->n", losses, losses) / len(x) - mean**2
    residual = np.sqrt(np.maximum(about_mean - slope**2 * (x @ x) / len(x), 0.0))
    return Lines(start, end, residual)


def categories(
    losses: Float[np.ndarray, "C N"], steps: Int[np.ndarray, " C"]
) -> Int[np.ndarray, " N"]:
    """The category of each token, an index into CATEGORIES.

    A fitted line that falls or rises by more than CHANGE nats is H->L or L->H. Of the others, those
    whose last loss is above the mean of all last losses are H->H, the rest L->L.
    """
    lines = fit(losses, steps)
    change, last = lines.end - lines.start, losses[-1]
    steady = np.where(last > last.mean(), CATEGORIES.index("H->H"), CATEGORIES.index("L->L"))
    moved = np.where(change > 0, CATEGORIES.index("L->H"), CATEGORIES.index("H->L"))
    return np.where(np.abs(change) > CHANGE, moved, steady)


def most_fluctuating(
    losses: Float[np.ndarray, "C N"], steps: Int[np.ndarray, " C"], n: int
) -> Int[np.ndarray, " n"]:
    """The n tokens whose loss strays furthest from its line (figure 2, c), the furthest first."""
    return np.argsort(-fit(losses, steps).residual, kind="stable")[:n]


def shares(category: Int[np.ndarray, " N"]) -> Float[np.ndarray, "4"]:
    """Share of the tokens in each category."""
    return np.bincount(category, minlength=len(CATEGORIES)) / max(len(category), 1)


def mean_curves(
    losses: Float[np.ndarray, "C N"], category: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "4 C"]:
    """Mean loss of each category at each checkpoint; NaN for an empty category."""
    member = np.eye(len(CATEGORIES))[category]  # [N, 4]
    with np.errstate(invalid="ignore"):
        return (losses @ member / member.sum(axis=0)).T
