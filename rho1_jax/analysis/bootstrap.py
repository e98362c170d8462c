"""Intervals by the bootstrap: paired differences, and how many tokens a baseline is worth.

Percentile intervals from a handful of seeds are too short: three cannot say more than their own
range, which holds the mean of new seeds only three times in four. So every interval is stretched
around its estimate by what Student's t asks of that many seeds; for the mean of normal values it
then agrees with the t interval, and tests/analysis/test_bootstrap.py measures its coverage.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from rho1_jax.errors import InputError


class Interval(NamedTuple):
    """An estimate and its 95 % interval; the ends are nan for one seed, or no finite estimate."""

    estimate: float
    low: float
    high: float


def interval(
    statistic: Callable[..., float], sizes: Sequence[int], *, draws: int = 2000
) -> Interval:
    """Bootstrap of `statistic` over crossed factors, each resampled with replacement.

    statistic: a function of one array of indices per factor. sizes: how many units each factor has;
    the first one's are the seeds, by whose number the interval is stretched.
    """
    if min(sizes) < 1:
        raise InputError(f"There is nothing to resample among {list(sizes)} seeds and rows.")
    rng = np.random.default_rng(0)
    estimate, seeds = statistic(*map(np.arange, sizes)), sizes[0]
    if seeds < 2 or not math.isfinite(estimate):
        return Interval(estimate, math.nan, math.nan)
    values = [statistic(*(rng.integers(n, size=n) for n in sizes)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    stretch = stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975) * math.sqrt(seeds / (seeds - 1))
    ends = (estimate + stretch * (end - estimate) for end in (low, high))
    return Interval(estimate, *ends)


def mean_loss(
    nats: Float[np.ndarray, "seeds rows"], targets: Float[np.ndarray, "rows"], *, draws: int = 2000
) -> Interval:
    """Nats per token over seeds and held-out rows.

    For a paired difference pass nats of one method minus those of another, from the same seeds and
    rows: what makes a seed or a row hard for both cancels.
    """

    def statistic(seeds: np.ndarray, rows: np.ndarray) -> float:
        return float(nats[np.ix_(seeds, rows)].sum() / (targets[rows].sum() * len(seeds)))

    return interval(statistic, nats.shape, draws=draws)


def tokens_to_baseline(
    baseline_tokens: Float[np.ndarray, "points"],
    baseline: Float[np.ndarray, "seeds points"],
    tokens: Float[np.ndarray, "steps"],
    losses: Float[np.ndarray, "seeds steps"],
) -> Interval:
    """How many times fewer tokens reach the baseline's last loss (5 means: with a fifth of them).

    The curves are means over the resampled seeds, with straight lines between their points. Never
    reached counts as 0, which the estimate or the lower end may be. Taken on a logarithmic scale.
    """

    def statistic(seeds: np.ndarray) -> float:
        level = baseline[seeds, -1].mean()
        reached = tokens_at(tokens, losses[seeds].mean(0), level)
        return math.log(baseline_tokens[-1] / reached) if reached < math.inf else -math.inf

    found = interval(statistic, losses.shape[:1])
    if found.estimate == -math.inf:
        return Interval(0.0, math.nan, math.nan)
    return Interval(*(math.exp(value) for value in found))


def tokens_at(
    tokens: Float[np.ndarray, "points"], loss: Float[np.ndarray, "points"], level: float
) -> float:
    """Where a curve first comes down to `level`, interpolated; inf if it never does."""
    below = np.flatnonzero(loss <= level)
    if not below.size:
        return math.inf
    i = int(below[0])
    if i == 0:
        return float(tokens[0])
    share = (loss[i - 1] - level) / (loss[i - 1] - loss[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))
