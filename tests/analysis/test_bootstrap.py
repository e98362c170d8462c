"""Bootstrap intervals: known distributions, coverage, pairing, and tokens to a baseline."""

import math

import numpy as np
import pytest
from scipy import stats

from rho1_jax.analysis import bootstrap
from rho1_jax.errors import InputError


def mean_of(values):
    return lambda seeds: float(values[seeds].mean())


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_covers_the_mean_of_a_normal_distribution(seeds):
    rng = np.random.default_rng(1)
    hits, trials = 0, 300
    for _ in range(trials):
        x = rng.normal(3.0, 2.0, seeds)
        found = bootstrap.interval(mean_of(x), [seeds], draws=100)
        hits += found.low <= 3.0 <= found.high
    # 0.95 nominal; without the stretch it is 0.75, 0.83 and 0.88.
    assert 0.92 <= hits / trials <= 0.99


def test_many_values_agree_with_students_t():
    x = np.random.default_rng(0).normal(size=200)
    found = bootstrap.interval(mean_of(x), [200])
    low, high = stats.t.interval(0.95, 199, loc=x.mean(), scale=stats.sem(x))
    np.testing.assert_allclose((found.low, found.high), (low, high), atol=0.015)
    assert found.estimate == x.mean()


def test_the_interval_holds_both_seeds_and_rows():
    """Two-way effects: the variance of the mean is that of the seeds plus that of the rows."""
    rng = np.random.default_rng(2)
    hits, trials = 0, 200
    for _ in range(trials):
        nats = 2.0 + 0.1 * rng.normal(size=(8, 1)) + 0.5 * rng.normal(size=(1, 40))
        found = bootstrap.mean_loss(nats * 10, np.full(40, 10.0), draws=100)
        hits += found.low <= 2.0 <= found.high
    assert 0.92 <= hits / trials <= 1.0


def test_pairing_cancels_what_two_methods_share():
    rng = np.random.default_rng(3)
    shared = rng.normal(5.0, 1.0, (4, 50))
    a, b = shared + 0.01 * rng.normal(size=(4, 50)), shared + 0.2
    found = bootstrap.mean_loss(a - b, np.ones(50))
    assert -0.23 < found.low < found.estimate < found.high < -0.17
    wide = bootstrap.mean_loss(a, np.ones(50))
    assert wide.high - wide.low > 10 * (found.high - found.low)


def test_rows_count_by_their_targets():
    nats, targets = np.array([[10.0, 1.0]]), np.array([10.0, 2.0])
    assert bootstrap.mean_loss(nats, targets).estimate == pytest.approx(11 / 12)


def test_one_seed_has_no_interval():
    found = bootstrap.mean_loss(np.ones((1, 5)), np.ones(5))
    assert found.estimate == 1.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_nothing_to_resample_is_said():
    with pytest.raises(InputError, match="nothing to resample"):
        bootstrap.interval(lambda *_: 0.0, [3, 0])


def test_tokens_at_interpolates_and_may_never_arrive():
    tokens, loss = np.array([0.0, 100.0, 200.0]), np.array([5.0, 3.0, 2.0])
    assert bootstrap.tokens_at(tokens, loss, 4.0) == 50.0
    assert bootstrap.tokens_at(tokens, loss, 2.0) == 200.0
    assert bootstrap.tokens_at(tokens, loss, 5.5) == 0.0
    assert bootstrap.tokens_at(tokens, loss, 1.9) == math.inf


def test_a_curve_five_times_faster():
    base_tokens, tokens = np.linspace(0, 1000, 101), np.linspace(0, 1000, 101)
    start = np.array([[4.0], [4.1], [3.9]])
    baseline, ours = start - base_tokens / 1000, start - tokens / 200
    found = bootstrap.tokens_to_baseline(base_tokens, baseline, tokens, ours)
    assert found.estimate == pytest.approx(5.0)
    assert found.low == pytest.approx(5.0, rel=0.01)
    assert found.high == pytest.approx(5.0, rel=0.01)
    slow = bootstrap.tokens_to_baseline(base_tokens, ours, tokens, baseline)
    assert slow.estimate == 0.0
