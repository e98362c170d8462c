"""Which rows a mixture visits, worked out for whole arrays, is what Grain says one by one."""

import grain.experimental
import numpy as np
import pytest

from rho1_jax.data import mixture


@pytest.mark.parametrize(
    "n_rows", [1, 2, 100, 2**14, 65_536, 65_537, 65_538, 262_145, 10**6 + 1, 2**31 + 5, 2**40 + 1]
)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 3_141_592_653])
def test_the_shuffle_is_grains(n_rows, seed):
    rng = np.random.default_rng(seed)
    places = np.unique([*rng.integers(0, n_rows, 40), 0, n_rows - 1]).astype(np.uint64)
    wanted = [
        grain.experimental.index_shuffle(int(i), max_index=n_rows - 1, seed=seed, rounds=4)
        for i in places
    ]
    assert mixture._shuffled(places, n_rows, seed).tolist() == wanted


CASES = [
    ({"web": 50, "books": 9}, {"web": 3.0, "books": 1.0}),
    ({"web": 1, "books": 1000}, {"web": 0.013, "books": 0.7}),
    ({"a": 700, "b": 400, "c": 31}, {"a": 0.6, "b": 0.3, "c": 0.1}),
    ({"a": 70_000}, {"a": 1.0}),
]


@pytest.mark.parametrize(("n_rows", "weights"), CASES)
@pytest.mark.parametrize("n", [0, 1, 7, 500, 2001])
def test_the_rows_visited_are_those_of_the_mixture(n_rows, weights, n, monkeypatch):
    monkeypatch.setattr(mixture, "_BLOCK", 64)
    numbers = {domain: mixture._Numbers(domain, rows) for domain, rows in n_rows.items()}
    elements = mixture.dataset(numbers, weights, 5)
    monkeypatch.setattr(mixture, "_SAMPLE", 1)  # what is compared here is not mended there
    found, slow = mixture.visited(n_rows, weights, 5, n), mixture._asked(elements, n_rows, n)
    assert found.keys() == slow.keys()
    for domain, seen in slow.items():
        np.testing.assert_array_equal(found[domain], seen)


def test_another_shuffle_of_grain_is_noticed(monkeypatch):
    n_rows, weights = {"web": 50_000, "books": 90}, {"web": 3.0, "books": 1.0}
    right = mixture.visited(n_rows, weights, 5, 200)
    monkeypatch.setattr(mixture, "_round_keys", lambda seed: [seed] * 4)
    found = mixture.visited(n_rows, weights, 5, 200)
    for domain, seen in right.items():
        np.testing.assert_array_equal(found[domain], seen)
