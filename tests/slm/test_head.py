"""The selective head: the gradient of the plain masked loss, whatever the scheme."""

import functools
import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rho1_jax.slm import head, rows
from rho1_jax.slm.selection import Selection, select

B, S, D, V = 8, 24, 16, 53


def setup(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    inputs = jax.random.randint(keys[0], (B, S), 0, V)
    params = {
        "embed": jax.random.normal(keys[1], (V, D)),
        "head": 0.3 * jax.random.normal(keys[2], (V, D)),
    }
    signals = {
        "loss": jnp.zeros((B, S)),
        "valid": jnp.arange(S) < jnp.array([S, 2, S, S, 0, S, 3, S])[:, None],
        "ref_loss": jax.random.normal(keys[3], (B, S)) + 4.0,
    }
    return params, inputs, jnp.roll(inputs, -1, 1), signals


def hidden_of(params, inputs, tied):
    return jnp.tanh(params["embed"][inputs]), params["embed" if tied else "head"]


def plain(params, inputs, targets, signals, selection, tied):
    """The masked loss by autodiff; its mask is made of the same losses."""

    def loss_fn(params):
        hidden, words = hidden_of(params, inputs, tied)
        log_p = jax.nn.log_softmax(hidden @ words.T)
        loss = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        mask = select(selection, {**signals, "loss": loss})
        return jnp.sum(loss, where=mask), mask

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


def selective(params, inputs, targets, signals, selection, tied, chunk_tokens, accumulated=False):
    capacity = rows.capacity(selection, B, S, accumulated=accumulated)

    def loss_fn(params):
        hidden, words = hidden_of(params, inputs, tied)
        loss, logits = head.token_losses(hidden, words, targets, chunk_tokens=chunk_tokens)
        mask = select(selection, {**signals, "loss": loss})
        return (
            head.selected_sum(
                hidden,
                words,
                targets,
                selection.weights(mask, signals),
                loss,
                logits,
                capacity,
                chunk_tokens,
            ),
            mask,
        )

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


def require_same(got, expected):
    (value, mask), grads = got
    (expected_value, expected_mask), expected_grads = expected
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert jnp.linalg.norm(g - e) <= 1e-5 * jnp.linalg.norm(e)


KEPT, AGAIN = 10_000, 48  # tokens whose logits fit the budget: all, or a quarter


@pytest.mark.parametrize("chunk_tokens", [KEPT, AGAIN])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("ratio", "scope"), [(0.1, "batch"), (0.6, "batch"), (1.0, "batch"), (0.4, "sequence")]
)
def test_gradient_is_that_of_the_plain_masked_loss(chunk_tokens, tied, ratio, scope):
    selection = Selection("excess", ratio, scope)
    got = jax.jit(functools.partial(selective, selection=selection, tied=tied,
                                    chunk_tokens=chunk_tokens))(*setup())  # fmt: skip
    require_same(got, plain(*setup(), selection, tied))


@pytest.mark.parametrize("chunk_tokens", [KEPT, AGAIN])
@pytest.mark.parametrize("score", ["excess", "union"])
def test_on_eight_devices_without_moving_the_hidden_states(chunk_tokens, score):
    parts = (("excess", 1.0), ("loss", 1.0)) if score == "union" else ()
    selection = Selection(score, 0.4, parts=parts, n_shards=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, *per_row = setup()
    per_row = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), per_row)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    step = jax.jit(functools.partial(selective, selection=selection, tied=False,
                                     chunk_tokens=chunk_tokens))  # fmt: skip
    require_same(step(params, *per_row), plain(*setup(), selection, False))
    hlo = step.lower(params, *per_row).compile().as_text()
    crossing = re.findall(r"= (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute)\(", hlo)
    shapes = [s.split(",") for kind in crossing for s in re.findall(r"\[([\d,]+)\]", kind)]
    # Scalars and losses cross, and the head's gradient is summed: nothing as large as [N, D].
    assert shapes
    assert max(math.prod(map(int, shape)) for shape in shapes) <= V * D


@pytest.mark.parametrize("chunk_tokens", [KEPT, AGAIN])
def test_overflowing_group_goes_through_all_rows(chunk_tokens):
    """All selected tokens on one of four shards: its rows do not fit, and nothing is lost."""
    selection = Selection("reference", 0.25, n_shards=4)
    params, inputs, targets, signals = setup()
    ref_loss = signals["ref_loss"]
    easy = jnp.where(jnp.arange(B)[:, None] < 2, ref_loss, 50.0 + ref_loss)
    signals = {**signals, "ref_loss": easy, "valid": jnp.ones((B, S), bool)}
    args = params, inputs, targets, signals, selection, False
    got = jax.jit(lambda p: selective(p, *args[1:], chunk_tokens))(params)
    found = rows.find(got[0][1], rows.capacity(selection, B, S, accumulated=False))
    assert not found.fit
    require_same(got, plain(*args))


def test_chunks_of_tokens_are_the_most_logits_there_are():
    params, *rest = setup()
    fn = functools.partial(selective, selection=Selection("excess", 0.4), tied=False)

    def biggest(chunk_tokens):
        jaxpr = jax.make_jaxpr(functools.partial(fn, chunk_tokens=chunk_tokens))(params, *rest)
        return max(_sizes(jaxpr.jaxpr))

    assert biggest(KEPT) == B * S * V
    assert biggest(AGAIN) <= max(1.2 * AGAIN * V, B * S * D)


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _sizes(sub)
