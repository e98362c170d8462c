"""What a reference makes of the loss beside a selection: weights by excess loss, distillation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.slm import losses
from rho1_jax.slm.selection import Selection, excess_weights, select
from tests.slm.test_step import B, S, apply, batch, random_params, run, same


@pytest.mark.parametrize(("score", "accumulation"), [("all", 1), ("excess", 4)])
def test_kept_tokens_weigh_what_their_excess_loss_says(score, accumulation):
    """Against the formula in float64, and its gradient by autodiff of a plain implementation."""
    data, reach, slope = batch(), 0.4, 1.5

    def plain_losses(params):
        hidden, head = apply(params, data.tokens[:, :-1])
        log_p = jax.nn.log_softmax(hidden @ head.T)
        return -jnp.take_along_axis(log_p, data.tokens[:, 1:, None], -1)[..., 0]

    loss, ref_loss = (np.asarray(plain_losses(random_params(i)), np.float64) for i in (0, 1))
    valid = np.asarray(data.valid)
    mean = np.array(
        [x[v].mean() if v.any() else 0 for x, v in zip(loss - ref_loss, valid, strict=True)]
    )
    weight = np.clip(
        2 / (1 + np.exp(-slope * (loss - ref_loss - mean[:, None]))), 1 - reach, 1 + reach
    )
    assert {0.6, 1.4} < set(weight[valid].round(9).tolist())
    signals = {"loss": jnp.float32(loss), "valid": data.valid, "ref_loss": jnp.float32(ref_loss)}
    weight = weight * np.asarray(select(Selection(score, 0.5), signals))
    grads = jax.grad(lambda p: jnp.sum(jnp.float32(weight) * plain_losses(p)) / weight.sum())(
        random_params(0)
    )
    expected = jax.tree.map(lambda p, g: p - g, random_params(0), grads)
    selection = Selection(score, 0.5, weight_range=reach, weight_slope=slope)
    state, metrics = run(selection, data, accumulation=accumulation)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), state.params, expected
    )
    assert metrics["selected"] == (weight > 0).sum()


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("accumulation", "cached"), [(1, True), (4, False), (4, True)])
def test_a_reference_teaches_beside_the_loss(everywhere, accumulation, cached):
    """The gradient against the sum by autodiff of plain parts, live and with what was kept."""
    data, weight = batch(), 0.7
    hidden, head = apply(random_params(1), data.tokens[:, :-1])
    top = losses.top_log_probs(hidden, head, 3, chunk_tokens=10_000)
    ref_loss, _ = losses.next_token_losses(
        apply, random_params(1), data.tokens, chunk_tokens=10_000
    )

    def total(params):
        hidden, head = apply(params, data.tokens[:, :-1])
        log_q = jax.nn.log_softmax(hidden @ head.T)
        loss = -jnp.take_along_axis(log_q, data.tokens[:, 1:, None], -1)[..., 0]
        signals = {"loss": loss, "valid": data.valid, "ref_loss": ref_loss}
        mask = select(Selection("excess", 0.5), signals)
        log_p, log_q = top[0], jnp.take_along_axis(log_q, top[1], -1)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        rest = [1.0 - x.sum(-1) for x in (p, q)]
        kl = jnp.sum(p * (log_p - log_q), -1) + rest[0] * jnp.log(rest[0] / rest[1])
        taught = data.valid if everywhere else mask
        return (jnp.sum(loss, where=mask) + weight * jnp.sum(kl, where=taught)) / mask.sum()

    grads = jax.grad(total)(random_params(0))
    expected = jax.tree.map(lambda p, g: p - g, random_params(0), grads)
    selection = Selection(
        "excess", 0.5, distill_weight=weight, distill_top=3, distill_all=everywhere
    )
    if cached:
        data = data._replace(
            cached={"ref_loss": ref_loss, "ref_top": top[0], "ref_top_ids": top[1]}
        )
    state, _ = run(selection, data, accumulation=accumulation)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), state.params, expected
    )


def test_weights_without_a_range_are_clm_bit_for_bit():
    flat = Selection("all", weight_range=0.0, weight_slope=3.0)
    same(run(flat, steps=3)[0], run(Selection("all"), steps=3)[0])
    data = batch()
    excess = jax.random.normal(jax.random.key(0), (B, S))
    assert (excess_weights(excess, data.valid, 3.0, 0.0) == 1.0).all()
