import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rho1_jax.models import attention, llama, placement, splash
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.attention import causal_attention


def reference(q, k, v, window):
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


# Within one block of queries, and over several; windows within a block, and over more than one.
# On one device, and with rows cut over several.
@pytest.mark.parametrize(
    ("seq_len", "window", "devices"),
    [(5, 3, 1), (300, None, 1), (300, 1, 1), (300, 7, 1), (300, 200, 1)]
    + [(600, None, 2), (600, 1, 2), (600, 200, 4), (12, 5, 4)],
)
def test_equals_jax_nn_in_value_and_gradient(seq_len, window, devices):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (
        jax.random.normal(key, (2, seq_len, heads, 8))
        for key, heads in zip(keys, (6, 2, 2, 6), strict=True)
    )

    def value_and_grad(attention):
        def loss(q, k, v):
            out = attention(q, k, v, window=window)
            return (out * weight).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    axes = ("sequence",) if devices > 1 else None
    with jax.set_mesh(jax.make_mesh((devices,), ("sequence",), (AxisType.Auto,))):
        (_, ours), our_grads = value_and_grad(functools.partial(causal_attention, batch_axes=axes))
    (_, theirs), their_grads = value_and_grad(reference)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_large_scores_do_not_overflow():
    q = jnp.full((1, 4, 1, 2), 1e3)
    v = jnp.arange(8.0).reshape(1, 4, 1, 2)
    np.testing.assert_allclose(causal_attention(q, q, v)[0, 3, 0], [3.0, 4.0], rtol=1e-6)


def test_bfloat16_scores_and_softmax_are_float32():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 200, 2, 16), jnp.bfloat16)
    q *= 8  # scores of about 8: eight bits of them would leave their weights 3 % off
    attention = jax.jit(causal_attention)
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    rounded = attention(q, k, v)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.016)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "cut", "why"),
    [("bfloat16", 64, False, None), ("float32", 64, False, "it takes bfloat16, not float32"),
     ("bfloat16", 256, False, "up to 128 numbers, not of 256"),
     ("bfloat16", 64, True, "parallelism")],
)  # fmt: skip
def test_why_a_gpu_does_not_take_the_faster_kernel(dtype, head_dim, cut, why, monkeypatch, caplog):
    cuda = types.SimpleNamespace(platform_version="cuda 13000")
    monkeypatch.setattr(attention, "get_backend", lambda: cuda)
    placement.kernel_not_used.cache_clear()
    q = jnp.zeros((2, 8, 4, head_dim), dtype)
    for _ in range(2):  # the reason is said once
        assert attention._cudnn_fits(q, cut=cut) == (why is None)
    assert len(caplog.records) == (why is not None)
    assert (why or "") in caplog.text


def test_no_kernel_is_missed_where_parameters_are_drawn(monkeypatch):
    """Neither is asked whether it fits, so neither says that it does not."""

    def asked(*_args, **_kwargs):
        raise AssertionError("a kernel was asked")

    monkeypatch.setattr(splash, "fits", asked)
    monkeypatch.setattr(attention, "_cudnn_fits", asked)
    shape = Architecture(
        vocab_size=11, width=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_width=8
    )
    jax.eval_shape(functools.partial(llama.init, shape), jax.random.key(0))
