"""Steps that change nothing, bit for bit, and those that the guard must not touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rho1_jax.slm import guard, step
from rho1_jax.slm.selection import Selection
from rho1_jax.slm.step import Batch

B, S, D, V = 8, 6, 8, 13
MARK = V - 1  # as the first token of a row, what tells some models below to misbehave
TX = optax.adamw(1e-3, weight_decay=0.5)


def apply(params, inputs):
    x = params["embed"][inputs]
    return jnp.tanh(jnp.cumsum(x, 1) @ params["mix"]), params["embed"]


def nan_in_one_gradient(params, inputs):
    """The model of `apply`, but that its gradient to mix[0, 0] is infinity times 0."""
    hidden, head = apply(params, inputs)
    zero = params["mix"][0, 0] - jax.lax.stop_gradient(params["mix"][0, 0])
    return hidden + jnp.sqrt(jnp.square(zero)), head


def nan_in_marked_rows(params, inputs):
    hidden, head = apply(params, inputs)
    return jnp.where(inputs[:, :1, None] == MARK, jnp.nan, hidden), head


def infinite_losses(params, inputs):
    """Finite logits of up to 3e38 of either sign, whose difference is infinite."""
    hidden, head = apply(params, inputs)
    return jnp.full_like(hidden, 3e38 / D), jnp.sign(head[:, :1]) * jnp.ones_like(head)


def loud_in_marked_rows(params, inputs):
    """The model of `apply` with a gradient ten thousand times as large."""
    hidden, head = apply(params, inputs)
    loud = hidden + 1e4 * (hidden - jax.lax.stop_gradient(hidden))
    return jnp.where(inputs[:, :1, None] == MARK, loud, hidden), head


def random_params(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {"embed": jax.random.normal(a, (V, D)), "mix": jax.random.normal(b, (D, D))}


def batch(marked=None, ref_loss=2.0):
    """Random rows; of them `marked` (a number or a slice) begin with MARK, the others do not."""
    tokens = jax.random.randint(jax.random.key(9), (B, S + 1), 0, V).at[:, 0].set(0)
    tokens = tokens if marked is None else tokens.at[marked, 0].set(MARK)
    return Batch(tokens, jnp.ones((B, S), bool), {"ref_loss": jnp.full((B, S), ref_loss)})


def step_fn(apply=apply, selection=None, tx=TX, **kwargs):
    """(state, batch) -> (state, metrics), not compiled."""
    method = step.Method(
        apply=apply, ref_apply=apply, tx=tx, selection=selection or Selection("excess", 0.5),
        chunk_tokens=10_000, ref_ema_decay=0.75, **kwargs,
    )  # fmt: skip
    fn = functools.partial(step.train_step, method=method)
    return lambda state, data: fn(state, None, data, jax.random.key(5))


@functools.cache
def compiled(*args, **kwargs):
    return jax.jit(step_fn(*args, **kwargs))


def after_one_step(spike=3.0):
    """A state whose moments, average and norms are not those of the start."""
    state = step.init_state(random_params(), TX, random_params(1), spike=spike)
    return compiled(spike=spike)(state, batch())[0]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def require_nothing_but_the_count_changed(old, new):
    assert new.step == old.step + 1
    same(new, old._replace(step=new.step))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("model", "data", "grad_norm_only"),
    [
        (nan_in_one_gradient, batch(), True),
        (nan_in_marked_rows, batch(marked=5), False),  # one microbatch of four
        (infinite_losses, batch(), False),
        (apply, batch(ref_loss=jnp.inf), False),
    ],
    ids=["nan in one gradient", "nan in one row", "infinite loss", "infinite ref_loss"],
)
def test_a_step_that_is_not_finite_changes_nothing(model, data, grad_norm_only, accumulation):
    old = after_one_step()
    run = compiled(model, spike=3.0, accumulation=accumulation)
    new, metrics = run(old, data)
    require_nothing_but_the_count_changed(old, new)
    assert metrics["bad"] == 1
    assert metrics["empty"] == 0
    broken = {name for name, x in metrics.items() if not jnp.isfinite(x)}
    assert broken == {"grad_norm"} if grad_norm_only else broken & {"loss", "ref_loss"}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_that_keeps_no_token_changes_nothing(accumulation):
    """Not by weight decay, nor by what is left of the moments of earlier steps."""
    old = after_one_step()
    run = compiled(selection=Selection("excess", 1e-6), spike=3.0, accumulation=accumulation)
    new, metrics = run(old, batch())
    require_nothing_but_the_count_changed(old, new)
    assert metrics["selected"] == 0
    assert metrics["empty"] == 1
    assert metrics["bad"] == 0


def test_training_goes_on_after_a_bad_step_as_if_it_had_not_been():
    old = after_one_step()
    skipped, _ = compiled(nan_in_marked_rows, spike=3.0)(old, batch(marked=0))
    gone_on, metrics = compiled(spike=3.0)(skipped, batch())
    expected, _ = compiled(spike=3.0)(old, batch())
    assert gone_on.step == expected.step + 1
    same(gone_on._replace(step=expected.step), expected)
    assert metrics["bad"] == metrics["empty"] == 0


def test_a_spike_is_skipped_once_enough_norms_are_known():
    run, loud = compiled(loud_in_marked_rows, spike=3.0), batch(marked=slice(None))
    state = step.init_state(random_params(), TX, random_params(1), spike=3.0)
    for _ in range(guard.WINDOW):
        before, (state, metrics) = state, run(state, batch())
        assert metrics["bad"] == 0
    accepted, metrics = run(before, loud)  # one norm is missing
    assert metrics["bad"] == 0
    assert (accepted.params["embed"] != before.params["embed"]).any()
    skipped, metrics = run(state, loud)
    assert metrics["grad_norm"] > 3.0 * jnp.median(state.norms)
    assert metrics["bad"] == 1
    assert skipped.norms[-1] == metrics["grad_norm"]
    require_nothing_but_the_count_changed(state, skipped._replace(norms=state.norms))
    assert run(skipped, batch())[1]["bad"] == 0


def test_norms_that_stay_high_are_accepted_in_the_end():
    run, loud = compiled(loud_in_marked_rows, spike=3.0), batch(marked=slice(None))
    state = after_one_step()._replace(norms=jnp.ones(guard.WINDOW))
    bad = []
    for _ in range(guard.WINDOW):
        state, metrics = run(state, loud)
        bad.append(float(metrics["bad"]))
    assert bad == [1.0] * (guard.WINDOW // 2) + [0.0] * (guard.WINDOW // 2)


@pytest.mark.parametrize("spike", [0.0, 3.0])
def test_a_good_step_has_the_bits_of_the_optimizer_alone(spike):
    """Not compiled as a whole, which may round the same sums in other ways."""
    keep = optax.GradientTransformation(
        init=lambda params: params, update=lambda grads, *_: (grads, grads)
    )
    start = step.init_state(random_params(), TX, random_params(1), spike=spike)
    kept = step_fn(tx=keep, spike=spike)(start._replace(opt_state=start.params), batch())[0]

    got, metrics = step_fn(spike=spike)(start, batch())
    updates, opt_state = TX.update(kept.opt_state, start.opt_state, start.params)
    params = optax.apply_updates(start.params, updates)
    ref_ema = optax.incremental_update(params, start.ref_ema, 0.25)
    same((got.params, got.opt_state, got.ref_ema), (params, opt_state, ref_ema))
    assert got.step == 1
    assert metrics["bad"] == metrics["empty"] == 0
    assert (got.norms is None) == (spike == 0.0)
