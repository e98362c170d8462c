"""The TPU's kernel, interpreted: equal to attention in blocks, on one device and on a mesh."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from rho1_jax.models import placement, splash
from rho1_jax.models.attention import causal_attention

AXES = ("data", "fsdp")
CUT = ("data", "sequence")  # the second along the rows


def qkv(heads, kv_heads, head_dim, batch=2, seq_len=256):
    keys = jax.random.split(jax.random.key(0), 4)
    widths = heads, kv_heads, kv_heads, heads
    return [
        jax.random.normal(key, (batch, seq_len, n, head_dim))
        for key, n in zip(keys, widths, strict=True)
    ]


def value_and_grads(attention, q, k, v, weight):
    def loss(q, k, v):
        out = attention(q, k, v)
        return (out * weight).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [(4, 2, 64, None), (2, 2, 128, 100), (2, 1, 64, 1000)],
)
def test_equals_blocks_in_value_and_gradient(heads, kv_heads, head_dim, window):
    x = qkv(heads, kv_heads, head_dim)
    kernel = functools.partial(splash.attention, window=window, batch_axes=None, interpret=True)
    ours = value_and_grads(kernel, *x)
    theirs = value_and_grads(functools.partial(causal_attention, window=window), *x)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_rows_and_heads_lie_over_a_mesh():
    x = qkv(4, 2, 64, batch=4, seq_len=128)
    kernel = functools.partial(splash.attention, window=None, batch_axes=AXES, interpret=True)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), (*AXES, "tensor"), (AxisType.Auto,) * 3)):
        ours = value_and_grads(kernel, *x)
    for a, b in zip(ours, value_and_grads(causal_attention, *x), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("mesh_shape", [(2, 2, 2), (1, 4, 2)])
def test_rows_are_cut_over_a_mesh(mesh_shape, window):
    x = qkv(4, 2, 64, seq_len=512)
    kernel = functools.partial(splash.attention, window=window, batch_axes=CUT, interpret=True)
    with jax.set_mesh(jax.make_mesh(mesh_shape, (*CUT, "tensor"), (AxisType.Auto,) * 3)):
        ours = value_and_grads(kernel, *x)
    theirs = value_and_grads(functools.partial(causal_attention, window=window), *x)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize(
    ("axes", "rows", "seq_len", "kv_heads", "fits"),
    [(AXES, 8, 256, 4, True), (AXES, 8, 200, 4, False), (AXES, 6, 256, 4, False),
     (AXES, 8, 256, 3, False), (CUT, 2, 256, 4, True), (CUT, 2, 384, 4, False)],
)  # fmt: skip
def test_fits_where_devices_get_whole_tiles_rows_and_heads(
    axes, rows, seq_len, kv_heads, fits, caplog
):
    placement.kernel_not_used.cache_clear()
    device = jax.sharding.AbstractDevice("TPU v5p", 2, "tpu")
    mesh = jax.sharding.AbstractMesh(
        (2, 2, 2), (*axes, "tensor"), (AxisType.Auto,) * 3, abstract_device=device
    )
    q, k, *_ = qkv(2 * kv_heads, kv_heads, 64, rows, seq_len)
    with jax.sharding.use_abstract_mesh(mesh):
        assert splash.fits(q, k, axes) == fits
        assert splash.fits(q, k, axes) == fits
    assert len(caplog.records) == (not fits)  # the reason, and once
    with jax.set_mesh(jax.make_mesh((2, 2, 2), (*axes, "tensor"), (AxisType.Auto,) * 3)):
        assert not splash.fits(q, k, axes)  # this is no TPU
