"""Trajectories of token losses: hand-made ones, and against a slow oracle."""

import time

import numpy as np
import pytest

from rho1_jax.analysis import dynamics
from rho1_jax.errors import InputError

STEPS = np.array([0, 10, 20, 40])


def test_hand_made_trajectories():
    losses = np.array(
        [[3.0, 3, 3, 3], [1, 1.1, 1.2, 1.4], [4, 3, 2, 1], [0.5, 0.5, 0.5, 0.5], [2.9, 3.3, 2.9, 3]]
    ).T
    named = [dynamics.CATEGORIES[i] for i in dynamics.categories(losses, STEPS)]
    assert named == ["H->H", "L->H", "H->L", "L->L", "H->H"]


def test_a_change_of_just_the_threshold_is_none():
    losses = np.stack([np.linspace(1, 1 + change, 4) for change in (0.19, 0.21, -0.19, -0.21)]).T
    named = [dynamics.CATEGORIES[i] for i in dynamics.categories(losses, np.arange(4))]
    assert named[1::2] == ["L->H", "H->L"]
    assert not {named[0], named[2]} & {"L->H", "H->L"}


def test_against_a_slow_oracle():
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, 1.0, (4, 200)) + rng.normal(0, 0.3, 200) * STEPS[:, None] / 20
    lines = dynamics.fit(losses, STEPS)
    category = dynamics.categories(losses, STEPS)
    for i in range(200):
        line = np.polynomial.Polynomial.fit(STEPS, losses[:, i], 1)
        start, end = line(STEPS[0]), line(STEPS[-1])
        rms = np.sqrt(np.mean((losses[:, i] - line(STEPS)) ** 2))
        np.testing.assert_allclose([x[i] for x in lines], [start, end, rms], atol=1e-9)
        expected = "H->L" if end - start < -0.2 else "L->H" if end - start > 0.2 else None
        if expected is None:
            expected = "H->H" if losses[-1, i] > losses[-1].mean() else "L->L"
        assert dynamics.CATEGORIES[category[i]] == expected
    assert len(set(category.tolist())) == 4


def test_shares_and_curves():
    losses = np.array([[1.0, 3, 5], [2, 4, 9]])
    category = np.array([1, 1, 3])
    np.testing.assert_allclose(dynamics.shares(category), [0, 2 / 3, 0, 1 / 3])
    curves = dynamics.mean_curves(losses, category)
    np.testing.assert_allclose(curves[[1, 3]], [[2, 3], [5, 9]])
    assert np.isnan(curves[[0, 2]]).all()


def test_most_fluctuating_strays_from_its_line_not_from_its_mean():
    steady, steep, jumpy, wave = [2.0, 2, 2, 2], [8.0, 6, 4, 0], [2.0, 3, 1, 2], [1.0, 3, 1, 3]
    losses = np.array([steady, steep, jumpy, wave]).T
    np.testing.assert_array_equal(dynamics.most_fluctuating(losses, STEPS, 2), [3, 2])


def test_one_checkpoint_is_no_trend():
    with pytest.raises(InputError, match="at least two checkpoints"):
        dynamics.categories(np.ones((2, 3)), np.array([5, 5]))


def test_the_papers_size_takes_less_than_a_second():
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (16, 300_000))
    start = time.process_time()
    dynamics.mean_curves(losses, dynamics.categories(losses, np.arange(16)))
    assert time.process_time() - start < 1
