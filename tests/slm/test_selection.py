"""Selection against a numpy oracle: exact count, ties to the earlier position, padding never."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rho1_jax.errors import InputError
from rho1_jax.slm.scores import SCORES
from rho1_jax.slm.selection import Domain, Selection, require_keeps_some, select, top_k_mask

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan, 1e-40]


def oracle(score, valid, ratio):
    """A stable sort: the k best, the earlier first among equals."""
    k = int(np.round(np.float32(ratio) * np.float32(valid.sum())))
    score = np.where(np.isnan(score), -np.inf, score) + 0.0
    order = sorted(np.flatnonzero(valid), key=lambda i: (-score[i], i))
    mask = np.zeros(len(score), bool)
    mask[order[:k]] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_top_k_matches_the_oracle(data):
    n = 24  # one shape, one compilation
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(-3, 3, width=32))
    score = np.array(data.draw(st.lists(values, min_size=n, max_size=n)), np.float32)
    score = np.where(np.abs(score) < 1e-37, 0.0, score).astype(np.float32)  # XLA flushes denormals
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    ratio = data.draw(st.floats(0.01, 1.0))
    got = np.asarray(jax.jit(top_k_mask)(score, valid, ratio))
    np.testing.assert_array_equal(got, oracle(score, valid, ratio))


def test_all_equal_scores_keep_the_first():
    mask = top_k_mask(jnp.zeros(10), jnp.ones(10, bool), 0.3)
    np.testing.assert_array_equal(mask, np.arange(10) < 3)


def test_same_set_as_lax_top_k_on_many_tokens():
    score = jax.random.normal(jax.random.key(0), (100_000,))
    mask = top_k_mask(score, jnp.ones(score.shape, bool), 0.6)
    _, indices = jax.lax.top_k(score, 60_000)
    assert mask.sum() == 60_000
    assert mask[indices].all()


def test_nothing_valid_keeps_nothing():
    assert not top_k_mask(jnp.ones(5), jnp.zeros(5, bool), 1.0).any()


def signals(loss, **kwargs):
    loss = jnp.asarray(loss, jnp.float32)
    return {"loss": loss, "valid": jnp.ones(loss.shape, bool), **kwargs}


def test_scopes_are_different_methods():
    # Row 0 holds the four highest losses of the batch.
    s = signals([[8, 7, 6, 5], [4, 3, 2, 1], [4, 3, 2, 1], [0, 0, 0, 9]])
    counts = {
        scope: np.asarray(select(Selection("loss", 0.25, scope, n_shards=2), s)).sum(1).tolist()
        for scope in ("batch", "microbatch", "shard", "sequence")
    }
    assert counts["batch"] == [3, 0, 0, 1]
    assert counts["microbatch"] == counts["batch"]  # one microbatch here; see test_step.py
    assert counts["shard"] == [2, 0, 1, 1]
    assert counts["sequence"] == [1, 1, 1, 1]


PARTS = (("excess", 1.0), ("middle", 0.5), ("diversity", 0.25))


def every_signal(n_rows=8, seq_len=24):
    """All that a score may read, of random tokens of which some are padding."""
    keys = jax.random.split(jax.random.key(2), 7)
    names = ("loss", "ref_loss", "ref_entropy", "utility", "noise")
    found = {
        name: jax.random.uniform(key, (n_rows, seq_len))
        for name, key in zip(names, keys, strict=False)
    }
    found["valid"] = jax.random.bernoulli(keys[5], 0.8, (n_rows, seq_len))
    return found | {"targets": jax.random.randint(keys[6], (n_rows, seq_len), 0, 2)}


@pytest.mark.parametrize("score", [*SCORES, "combined", "intersection"])
@pytest.mark.parametrize(("scope", "rows_each"), [("sequence", 1), ("shard", 2), ("microbatch", 8)])
def test_tokens_compete_with_those_of_their_group_alone(score, scope, rows_each):
    """Whatever other groups lie in the batch, and in which order."""
    s = every_signal()
    selection = Selection(score, 0.4, scope, PARTS, n_shards=8 // rows_each)
    mask = select(selection, s)
    assert 0 < mask.sum() < s["valid"].sum()
    groups = np.random.default_rng(0).permutation(8 // rows_each)
    order = (groups[:, None] * rows_each + np.arange(rows_each)).reshape(-1)
    moved = select(selection, {name: x[order] for name, x in s.items()})
    np.testing.assert_array_equal(moved, mask[order])
    alone = Selection(score, 0.4, "batch", PARTS)
    first = select(alone, {name: x[:rows_each] for name, x in s.items()})
    np.testing.assert_array_equal(first, mask[:rows_each])


@pytest.mark.parametrize("scope", ["batch", "sequence", "shard"])
@pytest.mark.parametrize("score", ["excess", "combined", "union"])
def test_domains_with_a_ratio_compete_among_themselves(score, scope):
    """Each competition against a selection of its own tokens alone, in numpy's order."""
    s = every_signal()
    number = np.array([0, 1, 2, 3, 0, 2, 2, 3])
    domains = tuple(
        Domain(name, 0.25, ratio) for name, ratio in zip("abcd", (0.0, 0.3, 1.0, 0.0), strict=True)
    )
    plain = Selection(score, 0.6, scope, PARTS, n_shards=2)
    got = select(
        dataclasses.replace(plain, domains=domains), s | {"domain": jnp.asarray(number)[:, None]}
    )
    expected = np.zeros(got.shape, bool)
    for numbers, ratio in (((0, 3), 0.6), ((1,), 0.3), ((2,), 1.0)):
        among = jnp.asarray(np.isin(number, numbers))[:, None]
        alone = dataclasses.replace(plain, ratio=ratio)
        expected |= np.asarray(select(alone, s | {"valid": s["valid"] & among}))
    np.testing.assert_array_equal(got, expected)
    everything = np.asarray(s["valid"])[number == 2]
    np.testing.assert_array_equal(np.asarray(got)[number == 2], everything)
    assert (got != select(plain, s)).any()
    with pytest.raises(InputError, match=r"set Batch\.domain"):
        select(dataclasses.replace(plain, domains=domains), s)


def test_domains_without_a_ratio_change_nothing():
    s = every_signal() | {"domain": jnp.arange(8)[:, None] % 2}
    plain = Selection("excess", 0.6)
    several = dataclasses.replace(plain, domains=(Domain("a", 0.5), Domain("b", 0.5)))
    np.testing.assert_array_equal(select(several, s), select(plain, s))


def test_a_repeated_part_keeps_the_tokens_of_one_with_the_summed_weight():
    s = every_signal()
    repeated = Selection("combined", 0.4, parts=(*PARTS, ("excess", 1.0)))
    once = Selection("combined", 0.4, parts=(("excess", 2.0), *PARTS[1:]))
    np.testing.assert_array_equal(select(repeated, s), select(once, s))
    assert (select(once, s) != select(Selection("combined", 0.4, parts=PARTS), s)).any()


@pytest.mark.parametrize(
    ("ratio", "scope", "accumulation", "keeps"),
    [
        (0.0001, "batch", 1, False), (0.6, "batch", 1, True), (0.004, "batch", 4, True),
        (0.004, "microbatch", 4, False), (0.02, "microbatch", 4, True),
        (0.015, "shard", 4, False), (0.04, "shard", 4, True),
        (0.01, "sequence", 1, False), (0.02, "sequence", 4, True),
    ],
)  # fmt: skip
def test_a_ratio_of_no_token_at_all_is_refused(ratio, scope, accumulation, keeps):
    selection = Selection("excess", ratio, scope, n_shards=2)
    refused = pytest.raises(InputError, match=f"scope={scope}. keeps none")
    with contextlib.nullcontext() if keeps else refused:
        require_keeps_some(selection, 8, 32, accumulation)


def test_a_ratio_that_grows_or_is_not_used_is_not_refused():
    require_keeps_some(Selection("excess", 0.0001, final_ratio=0.6), 8, 32)
    require_keeps_some(Selection("excess", 0.0001, unselected_weight=0.1), 8, 32)
    require_keeps_some(Selection("all", 0.0001), 8, 32)


def test_set_operations_and_their_realised_ratio():
    s = signals(
        [[0.0] * 4],
        ref_loss=jnp.array([[1.0, 2.0, 3.0, 4.0]]),
        ref_entropy=jnp.array([[1.0, 4.0, 2.0, 3.0]]),
    )
    parts = (("reference", 1.0), ("entropy", 1.0))
    both = select(Selection("intersection", 0.5, parts=parts), s)
    either = select(Selection("union", 0.5, parts=parts), s)
    np.testing.assert_array_equal(both[0], [True, False, False, False])
    np.testing.assert_array_equal(either[0], [True, True, True, False])


def test_all_is_every_valid_token():
    s = signals([[1.0, 2.0]], valid=jnp.array([[True, False]]))
    np.testing.assert_array_equal(select(Selection("all", 1.0), s), s["valid"])


@pytest.mark.parametrize(("schedule", "third"), [("linear", 0.7666667), ("cosine", 0.8)])
def test_the_ratio_moves_from_the_first_step_to_the_last(schedule, third):
    selection = Selection("loss", 0.9, final_ratio=0.5, schedule=schedule, steps=61)
    ratios = [jax.jit(selection.ratio_at)(jnp.int32(s)) for s in (0, 20, 30, 60, 99)]
    np.testing.assert_allclose(ratios, [0.9, third, 0.7, 0.5, 0.5], atol=1e-6)


def test_a_ratio_that_stays_is_no_traced_value():
    assert Selection("loss", 0.9).ratio_at(jnp.int32(3)) == 0.9


def test_no_gradient_through_the_selection():
    def kept_sum(loss):
        return jnp.sum(select(Selection("loss", 0.5), signals(loss)).astype(jnp.float32) * 2.0)

    assert not jax.grad(kept_sum)(jnp.arange(6.0).reshape(2, 3)).any()


@pytest.mark.parametrize("scope", ["batch", "shard", "sequence"])
def test_same_mask_on_one_and_eight_devices(scope):
    selection = Selection("loss", 0.37, scope, n_shards=8)
    # Few distinct values, so that ties cross the borders of the shards.
    s = signals(jax.random.randint(jax.random.key(1), (16, 32), 0, 5))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(s["loss"], NamedSharding(mesh, P("data")))
    run = jax.jit(lambda loss: select(selection, {**s, "loss": loss}))
    np.testing.assert_array_equal(run(spread), run(s["loss"]))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": 1.5}, "at most 1"),
        ({"score": "exces"}, "did you mean excess"),
        ({"scope": "bach"}, "did you mean batch"),
        ({"score": "union"}, "name at least two"),
        ({"final_ratio": 1.2}, "select.final_ratio is 1.2"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"unselected_weight": 1.0}, "below 1"),
    ],
)
def test_nonsense_is_one_sentence(kwargs, words):
    with pytest.raises(InputError, match=words):
        Selection(**kwargs)
