"""The examples of docs/examples do what they say."""

import jax.numpy as jnp
import numpy as np

from docs.examples import own_model
from docs.examples.relative import relative


def test_a_score_of_ones_own():
    score = relative(jnp.array([[3.0, 3.0]]), jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(score, [[1.0, 1 / 3]], rtol=1e-6)


def test_a_model_of_ones_own_learns_what_it_selects(capsys):
    clean, kept = own_model.main(40)
    assert clean[-1] < 0.2 * clean[0]
    assert kept[-1] < 0.8 * kept[0]
    assert "nats on clean rows" in capsys.readouterr().out
