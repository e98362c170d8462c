"""The step: CLM at ratio 1 bit for bit, selected tokens alone, accumulation = one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rho1_jax.errors import InputError
from rho1_jax.slm import losses, step
from rho1_jax.slm.scores import SCORES
from rho1_jax.slm.selection import Selection, select
from rho1_jax.slm.step import Batch

B, S, D, V = 8, 6, 8, 13


def apply(params, inputs):
    x = params["embed"][inputs]
    return jnp.tanh(jnp.cumsum(x, 1) @ params["mix"]), params["embed"]


def random_params(seed):
    a, b = jax.random.split(jax.random.key(seed))
    return {"embed": jax.random.normal(a, (V, D)), "mix": jax.random.normal(b, (D, D))}


def batch(**kwargs):
    tokens = jax.random.randint(jax.random.key(9), (B, S + 1), 0, V)
    return Batch(tokens, jnp.arange(S) < jnp.array([S, 2, S, S, 0, S, 3, S])[:, None], **kwargs)


TX = optax.sgd(1.0)


def method(selection, **kwargs):
    kwargs = {"chunk_tokens": 10_000} | kwargs
    return step.Method(apply=apply, ref_apply=apply, tx=TX, selection=selection, **kwargs)


def run(selection, data=None, *, ref=None, accumulation=1, params=None, steps=1):
    fn = jax.jit(
        functools.partial(step.train_step, method=method(selection, accumulation=accumulation))
    )
    state = step.init_state(random_params(0) if params is None else params, TX)
    for _ in range(steps):
        state, metrics = fn(
            state, random_params(1) if ref is None else ref, data or batch(), jax.random.key(5)
        )
    return state, metrics


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("score", ["excess", "random", "loss"])
def test_ratio_one_is_clm_bit_for_bit(score):
    same(run(Selection(score, 1.0), steps=3)[0], run(Selection("all", 1.0), steps=3)[0])


def test_gradient_is_that_of_the_selected_tokens():
    """Against the formula: mean loss over the mask, by autodiff of a plain implementation."""
    data, selection = batch(), Selection("excess", 0.5)

    def plain_losses(params):
        hidden, head = apply(params, data.tokens[:, :-1])
        log_p = jax.nn.log_softmax(hidden @ head.T)
        return -jnp.take_along_axis(log_p, data.tokens[:, 1:, None], -1)[..., 0]

    loss, ref_loss = (plain_losses(random_params(seed)) for seed in (0, 1))
    mask = select(selection, {"loss": loss, "valid": data.valid, "ref_loss": ref_loss})
    assert mask.sum() == round(0.5 * float(data.valid.sum()))
    grads = jax.grad(lambda p: jnp.sum(plain_losses(p) * mask) / mask.sum())(random_params(0))
    expected = jax.tree.map(lambda p, g: p - g, random_params(0), grads)
    close(run(selection, data)[0].params, expected)


def test_unselected_tokens_change_nothing():
    """The targets of unselected last positions feed nothing else: changing them must not matter."""
    data, selection = batch(), Selection("reference", 0.5)
    ref_loss = jnp.where(jnp.arange(S) == S - 1, 9.0, jnp.linspace(0, 1, S)) * jnp.ones((B, 1))
    data = data._replace(cached={"ref_loss": ref_loss})
    other = data._replace(tokens=data.tokens.at[:, -1].set(0))
    assert (other.tokens != data.tokens).any()
    same(run(selection, data)[0].params, run(selection, other)[0].params)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_unselected_tokens_weigh_the_unselected_weight(accumulation):
    """Against the formula: the weighted mean, by autodiff of a plain implementation."""
    data, unselected_weight = batch(), 0.25

    def weighted_mean(params):
        hidden, head = apply(params, data.tokens[:, :-1])
        log_p = jax.nn.log_softmax(hidden @ head.T)
        loss = -jnp.take_along_axis(log_p, data.tokens[:, 1:, None], -1)[..., 0]
        mask = select(Selection("loss", 0.5), {"loss": loss, "valid": data.valid})
        weight = jnp.where(mask, 1.0, unselected_weight) * data.valid
        return jnp.sum(weight * loss) / weight.sum()

    grads = jax.grad(weighted_mean)(random_params(0))
    expected = jax.tree.map(lambda p, g: p - g, random_params(0), grads)
    selection = Selection("loss", 0.5, unselected_weight=unselected_weight)
    state, _ = run(selection, data, accumulation=accumulation)
    close(state.params, expected)


def test_the_ratio_follows_its_schedule():
    selection = Selection("excess", 1.0, final_ratio=0.25, steps=4)
    n = float(batch().valid.sum())
    for steps, ratio in ((1, 1.0), (2, 0.75), (4, 0.25)):
        assert run(selection, steps=steps)[1]["selected"] == round(n * ratio)
    same(run(selection)[0].params, run(Selection("all", 1.0))[0].params)


def test_a_schedule_that_stays_is_the_plain_selection():
    moving = Selection("excess", 0.5, final_ratio=0.5, schedule="cosine", steps=3)
    same(run(moving, steps=3), run(Selection("excess", 0.5), steps=3))


def test_an_average_of_the_policy_is_its_reference():
    """Two steps by hand: the first against the average it was given, the second against the moved
    one."""
    selection = Selection("excess", 0.5)
    fn = functools.partial(
        step.train_step, batch=batch(), key=jax.random.key(5), method=method(selection)
    )
    following = functools.partial(fn, method=method(selection, ref_ema_decay=0.75))
    start = step.init_state(random_params(0), TX, ref_ema=random_params(1))
    first, _ = following(start, None)
    fixed, _ = fn(step.init_state(random_params(0), TX), random_params(1))
    same(first.params, fixed.params)
    moved = jax.tree.map(lambda r, p: 0.75 * r + 0.25 * p, random_params(1), fixed.params)
    close(first.ref_ema, moved)
    second, metrics = following(first, None)
    by_hand, same_metrics = fn(fixed, moved)
    close(second.params, by_hand.params)
    close(metrics, same_metrics)


def test_padding_changes_nothing():
    data = batch()
    padded = jnp.pad(~data.valid, ((0, 0), (1, 0)))
    other = data._replace(tokens=jnp.where(padded, 0, data.tokens))
    for selection in (Selection("excess", 0.5), Selection("all", 1.0)):
        close(run(selection, data)[0].params, run(selection, other)[0].params)


@pytest.mark.parametrize(
    ("score", "scope"),
    [  # random, sequence is missing: that control draws anew in each microbatch
        ("excess", "batch"), ("all", "batch"), ("random", "batch"), ("excess", "sequence"),
        ("all", "sequence"),
    ],
)  # fmt: skip
def test_accumulation_equals_one_batch(score, scope):
    selection = Selection(score, 1.0 if score == "all" else 0.4, scope)
    whole, whole_metrics = run(selection)
    parts, parts_metrics = run(selection, accumulation=4)
    close(whole, parts)
    close(whole_metrics, parts_metrics)


def kept_by_step(selection, data, accumulation):
    """The mask that a step makes, read off its counts with one token at a time as the useful."""
    fn = functools.partial(step.train_step, method=method(selection, accumulation=accumulation))
    state = step.init_state(random_params(0), TX)

    def kept(useful):
        marked = data._replace(useful=useful)
        return fn(state, random_params(1), marked, jax.random.key(5))[1]["selected_useful"]

    each_token = jnp.eye(B * S, dtype=bool).reshape(-1, B, S)
    return jax.jit(jax.vmap(kept))(each_token).reshape(B, S) > 0


@pytest.mark.parametrize(
    ("score", "scope"),
    # Random is missing: that control draws anew in each microbatch.
    [(score, "sequence") for score in (*SCORES, "combined") if score != "random"]
    + [(score, scope) for score in ("excess", "combined") for scope in ("shard", "microbatch")],
)
def test_tokens_compete_with_those_of_their_microbatch(score, scope):
    """Scopes below the batch, against `select` of each microbatch: rows i, i + n, i + 2n, ..."""
    utility = jax.random.uniform(jax.random.key(3), (B, S))
    data = batch(cached={"utility": utility})
    view = functools.partial(losses.next_token_losses, apply, chunk_tokens=10_000)
    loss, _ = view(random_params(0), data.tokens)
    ref_loss, ref_entropy = view(random_params(1), data.tokens, entropy=True)
    signals = {
        "loss": loss, "ref_loss": ref_loss, "ref_entropy": ref_entropy, "utility": utility,
        "valid": data.valid, "targets": data.tokens[:, 1:],
    }  # fmt: skip
    parts = (("excess", 1.0), ("middle", 0.5), ("diversity", 0.25))
    selection, n = Selection(score, 0.4, scope, parts, n_shards=2), 4
    expected = np.zeros((B, S), bool)
    for i in range(n):
        expected[i::n] = select(selection, {name: x[i::n] for name, x in signals.items()})
    np.testing.assert_array_equal(kept_by_step(selection, data, n), expected)
    if scope == "sequence":  # no matter how the rows are spread
        np.testing.assert_array_equal(select(selection, signals), expected)


def test_the_random_control_draws_anew_in_each_step():
    chosen = [
        step.train_step(
            step.init_state(random_params(0), TX)._replace(step=jnp.int32(at)), None, batch(),
            jax.random.key(0), method=method(Selection("random", 0.5)),
        )[1]["loss_selected"]
        for at in (0, 0, 1)
    ]  # fmt: skip
    assert chosen[0] == chosen[1] != chosen[2]


def test_microbatch_scope_competes_within_the_microbatch():
    data = batch()._replace(valid=jnp.ones((B, S), bool))
    # Rows 0, 2, 4, 6 form the first of two microbatches: make the reference bad at all of them.
    ref_loss = jnp.where(jnp.arange(B)[:, None] % 2, 0.0, 100.0) * jnp.ones(S)
    useful = jnp.arange(B)[:, None] % 2 * jnp.ones(S) > 0
    data = data._replace(useful=useful, cached={"ref_loss": ref_loss})
    _, batch_scope = run(Selection("excess", 0.5, "batch"), data, accumulation=2)
    _, micro_scope = run(Selection("excess", 0.5, "microbatch"), data, accumulation=2)
    assert batch_scope["selected_useful"] == B * S // 2
    assert micro_scope["selected_useful"] == B * S // 4


def test_cached_scores_equal_the_live_reference():
    selection = Selection("intersection", 0.6, parts=(("excess", 1.0), ("entropy", 1.0)))
    live, _ = run(selection)
    fn = functools.partial(losses.next_token_losses, apply, random_params(1))
    ref_loss, ref_entropy = fn(batch().tokens, chunk_tokens=10_000, entropy=True)
    cached, _ = run(selection, batch(cached={"ref_loss": ref_loss, "ref_entropy": ref_entropy}))
    close(live, cached)


def test_reference_has_no_gradient():
    def loss_after_step(ref):
        state, _ = step.train_step(
            step.init_state(random_params(0), TX), ref, batch(), jax.random.key(0),
            method=method(Selection("excess", 0.5)),
        )  # fmt: skip
        return sum(x.sum() for x in jax.tree.leaves(state.params))

    assert not any(g.any() for g in jax.tree.leaves(jax.grad(loss_after_step)(random_params(1))))


def test_metrics_are_sums_and_counts():
    data = batch(useful=jnp.arange(S) % 2 == jnp.zeros((B, 1)))
    _, m = run(Selection("excess", 0.5), data)
    assert m["tokens"] == data.valid.sum()
    assert m["selected"] == round(float(data.valid.sum()) / 2)
    assert m["useful"] == (data.useful & data.valid).sum()
    assert 0 <= m["selected_useful"] <= m["selected"]
    assert {"loss", "loss_selected", "ref_loss", "ref_loss_selected", "grad_norm"} <= m.keys()


def test_no_valid_token_is_a_zero_update():
    data = batch()._replace(valid=jnp.zeros((B, S), bool))
    same(run(Selection("excess", 0.5), data)[0].params, random_params(0))


def test_a_utility_comes_with_the_batch():
    useful = jnp.arange(S) % 2 == jnp.zeros((B, 1))
    data = batch(useful=useful, cached={"utility": useful.astype(jnp.float32)})
    _, metrics = run(Selection("utility", 0.3), data)
    assert metrics["selected_useful"] == metrics["selected"] > 0
    with pytest.raises(InputError, match="set select.utility"):
        run(Selection("utility", 0.3))


def test_missing_reference_is_one_sentence():
    with pytest.raises(InputError, match="neither a reference model nor cached scores"):
        step.train_step(
            step.init_state(random_params(0), TX), None, batch(), jax.random.key(0),
            method=method(Selection("excess", 0.5), chunk_tokens=10),
        )  # fmt: skip


def test_golden_step():
    """Three steps of known numbers. If you changed the method on purpose, put the new ones here."""
    _, metrics = run(Selection("excess", 0.6), steps=3)
    golden = {
        "selected": 21.0,
        "loss": 130.38974,
        "loss_selected": 85.507965,
        "ref_loss_selected": 92.1028,
        "grad_norm": 2.8737514,
    }
    for name, value in golden.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
