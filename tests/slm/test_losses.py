"""Chunked losses equal the plain formula in value and gradient."""

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.slm import losses

B, S, D, V = 2, 7, 8, 11


def setup():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 0.3 * jax.random.normal(keys[0], (B, S, D))  # logits of order 1
    head = jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, S), 0, V)
    return hidden, head, targets


def plain(hidden, head, targets):
    log_p = jax.nn.log_softmax(hidden @ head.T)
    loss = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return loss, -jnp.sum(jnp.exp(log_p) * log_p, -1)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 6, 14, 1000])
def test_chunked_equals_plain(chunk_tokens):
    hidden, head, targets = setup()
    got = losses.token_losses(hidden, head, targets, chunk_tokens=chunk_tokens, entropy=True)
    for mine, theirs in zip(got, plain(hidden, head, targets), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)

    def total(fn):
        return jax.grad(lambda h, w: jnp.sum(fn(h, w) * jnp.arange(S)), argnums=(0, 1))(
            hidden, head
        )

    chunked = total(lambda h, w: losses.token_losses(h, w, targets, chunk_tokens=chunk_tokens)[0])
    full = total(lambda h, w: plain(h, w, targets)[0])
    for mine, theirs in zip(chunked, full, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def plain_divergence(logits, teacher, n):
    """Of logits [B, S, V]: the n likeliest tokens of the teacher, and all others as one."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    known = log_p >= jnp.sort(log_p, -1)[..., -n][..., None]
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    rest = [jnp.sum(x, -1, where=~known) for x in (p, q)]
    return jnp.sum(p * (log_p - log_q), -1, where=known) + rest[0] * jnp.log(rest[0] / rest[1])


@pytest.mark.parametrize("chunk_tokens", [1, 6, 1000])
@pytest.mark.parametrize("n", [1, 4, V - 1])
def test_divergence_from_the_likeliest_tokens_of_another(chunk_tokens, n):
    """Value and gradients against the formula in float64; all but one token is the whole KL."""
    hidden, head, _ = setup()
    teacher = hidden[::-1]
    top = losses.top_log_probs(teacher, head, n, chunk_tokens=chunk_tokens)
    weight = jnp.arange(S)

    def total(h, w):
        kl = losses.top_divergence(h, w, *top, chunk_tokens=chunk_tokens)
        return jnp.sum(kl * weight), kl

    (_, kl), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden, head, teacher)]
        fixed = wide[2] @ wide[1].T  # the head of the teacher is not differentiated

        def plain(h, w):
            return plain_divergence(h @ w.T, fixed, n)

        expected = plain(*wide[:2])
        expected_grads = jax.grad(lambda h, w: jnp.sum(plain(h, w) * weight), argnums=(0, 1))(
            *wide[:2]
        )
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    same = losses.top_divergence(teacher, head, *top, chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_no_array_of_all_logits_when_chunked():
    hidden, head, targets = setup()

    def biggest(chunk_tokens):
        fn = jax.grad(
            lambda h: losses.token_losses(h, head, targets, chunk_tokens=chunk_tokens)[0].sum()
        )
        return max(_sizes(jax.make_jaxpr(fn)(hidden).jaxpr))

    assert biggest(1000) == B * S * V
    assert biggest(4) <= max(4 * V, B * (S + 1) * D)


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for sub in jex.core.jaxprs_in_params(eqn.params):
            yield from _sizes(sub)


def test_empty_mask_gives_zero_and_hides_nan():
    x = jnp.array([[jnp.nan, 1.0]])
    assert losses.masked_sum(x, jnp.zeros((1, 2), bool)) == 0
    assert losses.masked_sum(x, jnp.array([[False, True]])) == 1


def test_next_token_shifts_by_one():
    """A model that names its own input as next token: loss ~0 where the text repeats itself."""
    tokens = jnp.array([[3, 3, 5, 5]])

    def echo(_, inputs):
        return 50.0 * jax.nn.one_hot(inputs, V), jnp.eye(V)

    loss, _ = losses.next_token_losses(echo, None, tokens, chunk_tokens=100)
    np.testing.assert_allclose(loss[0], [0.0, 50.0, 0.0], atol=1e-4)
