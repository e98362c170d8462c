"""Scores against hand numbers: the sign of each is the method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.slm import scores

LOSS = jnp.array([[1.0, 4.0, 2.0]])
REF = jnp.array([[0.5, 1.0, 3.0]])
ENTROPY = jnp.array([[0.1, 2.0, 1.0]])
SIGNALS = {
    "loss": LOSS, "valid": jnp.ones((1, 3), bool), "ref_loss": REF, "ref_entropy": ENTROPY,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("excess", [0.5, 3.0, -1.0]),
        ("loss", [1.0, 4.0, 2.0]),
        ("reference", [-0.5, -1.0, -3.0]),
        ("entropy", [-0.1, -2.0, -1.0]),
        ("inverse", [-0.5, -3.0, 1.0]),
    ],
)
def test_hand_numbers(name, expected):
    np.testing.assert_allclose(scores.score(name, SIGNALS)[0], expected, rtol=1e-6)


def test_middle_is_nearness_to_the_median_of_the_valid():
    loss, valid = jnp.array([[9.0, 1.0, 2.0, 4.0]]), jnp.array([[False, True, True, True]])
    np.testing.assert_array_equal(scores.middle(loss, valid)[0, 1:], [-1.0, 0.0, -2.0])


def test_diversity_counts_earlier_repeats_of_the_ngram():
    def slow(targets, valid):
        seen, out = {}, np.zeros(targets.shape)
        for r, row in enumerate(targets):
            for i in range(len(row)):
                gram = tuple([None, None, None, *row][i : i + scores.NGRAM])
                if valid[r, i]:
                    out[r, i] = -seen.get(gram, 0)
                    seen[gram] = seen.get(gram, 0) + 1
        return out

    rng = np.random.default_rng(0)
    targets, valid = rng.integers(0, 2, (4, 24)), rng.random((4, 24)) < 0.8
    got = np.asarray(scores.diversity(jnp.asarray(targets, jnp.int32), jnp.asarray(valid)))
    np.testing.assert_array_equal(got[valid], slow(targets, valid)[valid])
    assert got.min() < -1


def test_utility_is_what_was_computed_beforehand():
    np.testing.assert_array_equal(scores.score("utility", {**SIGNALS, "utility": REF}), REF)


def test_random_depends_on_the_draw_alone():
    noise, other_noise = (jax.random.uniform(jax.random.key(i), (1, 3)) for i in (0, 1))
    first = scores.score("random", {**SIGNALS, "noise": noise})
    again = scores.score("random", {**SIGNALS, "noise": noise, "loss": REF})
    other = scores.score("random", {**SIGNALS, "noise": other_noise})
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_combined_adds_standardised_scores():
    def z(x):
        return (x - x.mean()) / x.std()

    got = scores.combined((("excess", 1.0), ("entropy", 0.5)), SIGNALS)
    expected = z(np.array([0.5, 3.0, -1.0])) + 0.5 * z(-np.asarray(ENTROPY[0]))
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)


def test_a_repeated_part_is_one_with_the_summed_weight():
    repeated = scores.combined((("excess", 0.5), ("entropy", -2.0), ("excess", 1.5)), SIGNALS)
    once = scores.combined((("excess", 2.0), ("entropy", -2.0)), SIGNALS)
    np.testing.assert_allclose(repeated, once, rtol=1e-5)


def test_standardised_ignores_padding():
    valid = jnp.array([[True, True, False]])
    got = scores.standardised(jnp.array([[1.0, 3.0, 1e6]]), valid)
    np.testing.assert_allclose(got[0, :2], [-1.0, 1.0], rtol=1e-5)
