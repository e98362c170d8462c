"""Relevance tells two clouds of hidden states apart; names of utilities are checked."""

import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.data import taggers
from rho1_jax.errors import InputError
from rho1_jax.training import utility


def test_relevance_is_high_where_the_states_are_those_of_the_clean_text():
    rng = np.random.default_rng(0)
    common = np.full(8, 5.0)  # what all hidden states share
    clean = common + np.eye(8)[rng.integers(0, 2, 300)] + rng.normal(0, 0.1, (300, 8))
    corpus = common + np.eye(8)[rng.integers(0, 8, 900)] + rng.normal(0, 0.1, (900, 8))
    centre, directions = utility.centroids(clean, corpus)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0, rtol=1e-6)

    def apply(params, inputs):
        return params[inputs], None

    states = jnp.asarray(common + np.eye(8), jnp.float32)  # token i is in the i-th cloud
    tokens = jnp.array([[0, 1, 2, 7, 3]])
    got = np.asarray(
        utility.relevance(apply, states, tokens, jnp.float32(centre), jnp.float32(directions))
    )
    assert got.shape == (1, 4)
    assert got[0, :2].min() > 0.9
    assert got[0, 2:].max() < 0.5


def test_states_are_thinned_before_they_are_gathered():
    table = jnp.arange(10.0)[:, None] * jnp.ones(3)
    tokens = jnp.arange(10)[None]
    got = utility.states(lambda params, inputs: (params[inputs], None), table, tokens, every=4)
    np.testing.assert_array_equal(got[0, :, 0], [0, 4, 8])


def test_parse():
    assert taggers.parse_utility("relevance") == ("relevance", ())
    assert taggers.parse_utility("tags:number,latex") == ("tags", ("number", "latex"))
    with pytest.raises(InputError, match="write relevance, or tags"):
        taggers.parse_utility("relevance:number")
