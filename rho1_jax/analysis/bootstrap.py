"""Intervals over seeds and held-out rows: paired differences, tokens that a baseline is worth.

A mean loss has its interval in closed form (`mean_loss`). Other statistics of a handful of seeds
are resampled (`interval`); since three cannot say more than their own range, which holds the mean
of new seeds only three times in four, those intervals are stretched around the estimate by what
Student's t asks of that many seeds. tests/analysis/test_bootstrap.py measures the coverage of both.
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
    nats: Float[np.ndarray, "seeds rows"], targets: Float[np.ndarray, "rows"]
) -> Interval:
    """Nats per token over seeds and held-out rows, both drawn from larger populations.

    For a paired difference pass nats of one method minus those of another, from the same seeds and
    rows: what makes a seed or a row hard for both cancels.

    The interval's half squared is Student's half of the seed means squared, plus that of what the
    rows add to it (two-way random effects, the components of variance each with its own t: after
    Cochran). So few seeds widen the part that seeds cause, and no more.
    """
    n, m = nats.shape
    if min(n, m) < 1:
        raise InputError(f"There is nothing to average among {n} seeds and {m} rows.")
    estimate = float(nats.sum() / (targets.sum() * n))
    if n < 2 or not math.isfinite(estimate):
        return Interval(estimate, math.nan, math.nan)
    # By how much each cell moves the ratio of sums, times their number: [seeds, rows], mean 0.
    moved = (nats - estimate * targets) / targets.mean()
    seeds, rows = moved.mean(1), moved.mean(0)
    half = (stats.t.ppf(0.975, n - 1) ** 2) * seeds.var(ddof=1) / n
    if m > 1:
        noise = np.square(moved - seeds[:, None] - rows).sum() / ((n - 1) * (m - 1))
        of_rows = max(rows.var(ddof=1) / m - noise / (n * m), 0.0)  # the seeds' part has the noise
        half += (stats.t.ppf(0.975, m - 1) ** 2) * of_rows
    return Interval(estimate, estimate - math.sqrt(half), estimate + math.sqrt(half))


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
