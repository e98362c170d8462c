"""Fits of downstream results on losses: known curves come back, with the sign they have."""

import numpy as np
import pytest

from rho1_jax.analysis import correlation
from rho1_jax.errors import InputError

X = np.array([1.0, 1.2, 1.5, 1.9, 2.4])


def test_linear_finds_the_line():
    fit = correlation.linear(X, 3.0 - 2.0 * X)
    np.testing.assert_allclose(fit, (-2.0, 3.0, 1.0), atol=1e-9)
    assert correlation.correlation(X, 3.0 - 2.0 * X) == pytest.approx(-1.0)


@pytest.mark.parametrize(("a", "c"), [(-0.3, 2.0), (0.5, 0.7)])
def test_logarithmic_finds_the_curve_and_its_sign(a, c):
    y = np.log(a * X + c)
    np.testing.assert_allclose(correlation.logarithmic(X, y), (a, c, 1.0), atol=1e-5)
    np.testing.assert_allclose(
        correlation.logarithmic(X, y, int(np.sign(a))), (a, c, 1.0), atol=1e-5
    )
    wrong = correlation.logarithmic(X, y, -int(np.sign(a)))
    assert wrong.a == pytest.approx(0.0, abs=1e-4)  # the best curve of the other sign is flat
    assert wrong.r2 == pytest.approx(0.0, abs=1e-4)


def test_against_another_least_squares():
    rng = np.random.default_rng(0)
    y = np.log(2.0 - 0.3 * X) + rng.normal(0, 0.02, X.size)
    fit = correlation.logarithmic(X, y)
    error = np.sum((np.log(fit.a * X + fit.c) - y) ** 2)
    grid = [(a, c) for a in np.linspace(-0.5, -0.1, 81) for c in np.linspace(1.5, 2.5, 101)]
    best = min(np.sum((np.log(a * X + c) - y) ** 2) for a, c in grid if a * X.max() + c > 0)
    assert error <= best
    assert fit.r2 == pytest.approx(1 - error / np.sum((y - y.mean()) ** 2))


@pytest.mark.parametrize("x", [[1.0, 2.0], [1.0, 1.0, 1.0]])
def test_too_few_checkpoints_is_one_sentence(x):
    with pytest.raises(InputError, match="at least three checkpoints"):
        correlation.logarithmic(np.array(x), np.arange(float(len(x))))
