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
        found = bootstrap.mean_loss(nats * 10, np.full(40, 10.0))
        hits += found.low <= 2.0 <= found.high
    assert 0.92 <= hits / trials <= 1.0


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("of_seed", "of_row", "noise"),
    [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.1, 1.0, 0.3), (0.02, 0.2, 1.0),
     (0.3, 1.0, 1.0)],
)  # fmt: skip
def test_a_mean_over_seeds_and_rows_is_covered_as_often_as_said(seeds, of_seed, of_row, noise):
    """Known truth, 500 draws: at 0.95 the share has a standard error of 0.01."""
    rng, rows, hits, widths = np.random.default_rng(4), 64, 0, []
    targets = np.full(rows, 10.0)
    for _ in range(500):
        nats = 2.0 + of_seed * rng.normal(size=(seeds, 1)) + of_row * rng.normal(size=rows)
        nats = nats + noise * rng.normal(size=(seeds, rows))
        found = bootstrap.mean_loss(10.0 * nats, targets)
        hits += found.low <= 2.0 <= found.high
        widths.append(found.high - found.low)
    assert hits / 500 >= 0.93
    # No wider than Student's t on the seeds' part and two standard errors of the rows' ask.
    t = stats.t.ppf(0.975, seeds - 1)
    ideal = np.hypot(t * np.sqrt((of_seed**2 + noise**2 / rows) / seeds), 2 * of_row / 8)
    assert np.mean(widths) <= 2.05 * ideal


def test_it_is_narrower_than_the_stretched_bootstrap_where_rows_matter():
    rng = np.random.default_rng(5)
    nats = 2.0 + 0.02 * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=64)
    nats = nats + 0.3 * rng.normal(size=(3, 64))

    def mean(seeds, rows):
        return float(nats[np.ix_(seeds, rows)].mean())

    ours, other = bootstrap.mean_loss(nats, np.ones(64)), bootstrap.interval(mean, nats.shape)
    assert ours.estimate == pytest.approx(other.estimate)
    assert ours.high - ours.low < 0.6 * (other.high - other.low)


def test_one_row_leaves_students_t_on_the_seeds():
    nats = np.array([[1.0], [2.0], [4.0]])
    found = bootstrap.mean_loss(nats, np.ones(1))
    expected = stats.t.interval(0.95, 2, loc=nats.mean(), scale=stats.sem(nats[:, 0]))
    np.testing.assert_allclose(found[1:], expected)


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
    with pytest.raises(InputError, match="nothing to average among 3 seeds and 0 rows"):
        bootstrap.mean_loss(np.ones((3, 0)), np.ones(0))


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
