"""Kept rows as numbers: a numpy oracle, gathers that stay on their device, and speed's oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rho1_jax.slm import rows
from rho1_jax.slm.rows import Capacity
from rho1_jax.slm.selection import Selection, top_k_mask


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=24, max_size=24), st.sampled_from([1, 3]))
def test_find_take_put_against_numpy(kept, groups):
    mask = np.array(kept).reshape(3, 8)
    found = jax.jit(rows.find, static_argnums=1)(mask, Capacity(groups, 24 // groups, True))
    x = np.arange(24.0)[:, None] + np.array([[0.0, 100.0]])
    n = 24 // groups
    for g in range(groups):
        numbers = np.flatnonzero(mask.reshape(groups, n)[g])
        np.testing.assert_array_equal(found.ids[g, : len(numbers)], numbers)
        assert (found.ids[g, len(numbers) :] == n).all()
    taken = np.asarray(rows.take(jnp.asarray(x), found))
    weight = np.asarray(found.weight) > 0
    np.testing.assert_array_equal(taken[weight], x[mask.reshape(-1)])
    back = rows.put(jnp.where(found.weight[:, None] > 0, taken, np.nan), found)
    np.testing.assert_array_equal(back, np.where(mask.reshape(-1, 1), x, 0.0))


def test_too_many_rows_are_noticed():
    mask = jnp.array([[True] * 3 + [False], [True, False, False, False]])
    assert rows.find(mask, Capacity(2, 3, False)).fit
    assert not rows.find(mask, Capacity(2, 2, False)).fit


def test_threshold_and_indices_are_those_of_lax_top_k():
    """With ties: lax.top_k prefers the earlier of equal scores, too."""
    score = jnp.round(jax.random.normal(jax.random.key(0), (50_000,)), 1)
    mask = top_k_mask(score, jnp.ones(score.shape, bool), 0.6)
    found = rows.find(mask[None], Capacity(1, 30_000, True))
    np.testing.assert_array_equal(found.ids[0], np.sort(jax.lax.top_k(score, 30_000)[1]))


@pytest.mark.parametrize("scope", ["batch", "microbatch", "shard", "sequence"])
@pytest.mark.parametrize("score", ["loss", "union", "intersection"])
@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.6, 0.95])
@pytest.mark.parametrize("n_shards", [1, 4])
def test_what_is_sure_to_fit_does_fit(scope, score, ratio, n_shards):
    """Against the worst case of each scope, with every token valid."""
    parts = (("loss", 1.0), ("reference", 1.0)) if score != "loss" else ()
    selection = Selection(score, ratio, scope, parts, n_shards)
    batch, seq_len = 8, 13
    c = rows.capacity(selection, batch, seq_len, accumulated=False)
    per_group = batch * seq_len // n_shards
    most = {"batch": batch * seq_len, "microbatch": batch * seq_len, "shard": per_group,
            "sequence": seq_len}[scope]  # fmt: skip
    kept = round(ratio * most) * (2 if score == "union" else 1)
    worst = min(kept * (batch // n_shards if scope == "sequence" else 1), per_group)
    assert c.rows <= per_group
    assert not c.sure or c.rows >= worst
    assert c.sure or (n_shards > 1 and scope in ("batch", "microbatch"))
    # Under accumulation one microbatch may hold more than its share of a batch-wide selection.
    again = rows.capacity(selection, batch, seq_len, accumulated=True)
    assert not again.sure or scope != "batch" or again.rows == per_group


@pytest.mark.parametrize("scope", ["batch", "microbatch", "shard", "sequence"])
def test_no_part_of_a_row_is_sure_of_its_share(scope):
    selection = Selection("loss", 0.5, scope, n_shards=2, row_parts=4)
    expected = Capacity(8, 40, False)  # 1.1 * 0.5 * 64, up to a multiple of 8
    assert rows.capacity(selection, 2, 256, accumulated=False) == expected
    everything = rows.capacity(Selection("all", n_shards=2, row_parts=4), 2, 256, accumulated=False)
    assert everything == Capacity(8, 64, True)


def test_the_largest_ratio_of_a_schedule_fits():
    rising = Selection("loss", 0.2, final_ratio=0.8)
    falling = Selection("loss", 0.8, final_ratio=0.2)
    fixed = Selection("loss", 0.8)
    found = [rows.capacity(s, 8, 13, accumulated=False) for s in (rising, falling, fixed)]
    assert found[0] == found[1] == found[2]
    weighted = Selection("loss", 0.2, unselected_weight=0.1)
    assert rows.capacity(weighted, 8, 13, accumulated=False).rows == 104


def test_gather_and_scatter_stay_on_their_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    x = jax.device_put(jnp.ones((16 * 32, 24)), split)
    mask = jax.device_put(jax.random.bernoulli(jax.random.key(0), 0.5, (16, 32)), split)

    def there_and_back(x, mask):
        found = rows.find(mask, Capacity(8, 48, True))
        return rows.put(2 * rows.take(x, found), found)

    compiled = jax.jit(there_and_back, out_shardings=split).lower(x, mask).compile()
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not any(name in compiled.as_text() for name in collectives)
    np.testing.assert_array_equal(compiled(x, mask)[:, 0], 2.0 * np.asarray(mask).reshape(-1))
