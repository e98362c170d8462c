"""Documents of packed rows: where they begin, and that on no path one of them sees another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rho1_jax.models import attention, documents, llama, splash
from rho1_jax.models.attention import causal_attention
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import losses, step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.slm.selection import Selection
from rho1_jax.training import sharding
from tests.models.test_splash import value_and_grads
from tests.training.test_parity import KEEP

SEPARATOR = 0
SHAPE = LlamaConfig(
    vocab_size=32, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24,
    separator=SEPARATOR,
)  # fmt: skip
PARAMS = jax.tree_util.tree_map_with_path(
    lambda path, x: x if "norm" in path[-1].key else 20 * x,  # so large that a wrong mask shows
    llama.init(SHAPE, jax.random.key(0)),
)
LENGTH = 512
# Where the second of two documents of a row begins: within, on and beyond a block of attention.
BORDERS = (5, 128, 300)


def test_starts_positions_and_lengths():
    row = np.array([[7, 8, 0, 7, 0, 0, 9, 9]])
    starts = documents.starts(row, 0)
    np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 4, 5, 5, 5]])
    np.testing.assert_array_equal(documents.positions(starts), [[0, 1, 0, 1, 0, 0, 1, 2]])
    np.testing.assert_array_equal(documents.lengths(starts), [[2, 2, 2, 2, 1, 3, 3, 3]])


def rows_of(borders=BORDERS, length=LENGTH, seed=0):
    """A row of two documents for each border."""
    tokens = np.random.default_rng(seed).integers(1, 32, (len(borders), length + 1))
    tokens[np.arange(len(borders)), list(borders)] = SEPARATOR
    return tokens.astype(np.int32)


def others_first(tokens, borders=BORDERS):
    """The same rows with another first document in each."""
    first = np.arange(tokens.shape[1]) < np.array(borders)[:, None]
    return np.where(first, rows_of(borders, tokens.shape[1] - 1, seed=1), tokens)


def second(borders=BORDERS, length=LENGTH):
    """bool: the targets of the second documents."""
    return np.arange(length) >= np.array(borders)[:, None]


def from_border(x, borders=BORDERS):
    """Each row from its border on; what follows the end, which no causal position sees, is 0."""
    rows = zip(np.array(x), borders, strict=True)
    return np.stack([np.concatenate([row[n:], np.zeros_like(row[:n])]) for row, n in rows])


def through_cudnn(monkeypatch):
    """The call that CUDA gets, answered by XLA."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(attention, "_cudnn_fits", lambda *_, **__: True)
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *x, **how: plain(*x, **how | {"implementation": "xla"}),
    )
    return causal_attention


def through_mask(monkeypatch):
    monkeypatch.setattr(attention, "_one_cpu", lambda: False)
    return causal_attention


PATHS = {
    "blockwise": lambda _: causal_attention,
    "blocks": through_mask,
    "cut": lambda _: functools.partial(causal_attention, batch_axes=("sequence",)),
    "cudnn": through_cudnn,
    "splash": lambda _: functools.partial(splash.attention, batch_axes=None, interpret=True),
    "splash, cut": lambda _: functools.partial(
        splash.attention, batch_axes=("sequence",), interpret=True
    ),
}


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("path", PATHS)
def test_attention_stops_at_a_border(path, window, monkeypatch):
    """Value and gradients of the second documents are those that plain attention gives them alone,
    and nothing of the first reaches them, not a bit."""
    attend = functools.partial(PATHS[path](monkeypatch), window=window)
    keys = jax.random.split(jax.random.key(0), 5)
    heads = (4, 2, 2, 4, 2)
    q, k, v, weight, noise = (
        jax.random.normal(key, (3, LENGTH, n, 64)) for key, n in zip(keys, heads, strict=True)
    )
    own = second()[..., None, None]
    starts = jnp.where(second(), jnp.array(BORDERS)[:, None], 0)

    cut = 2 if "cut" in path else 1
    with jax.set_mesh(jax.make_mesh((cut,), ("sequence",), (AxisType.Auto,))):
        both = functools.partial(attend, starts=starts)
        ours = value_and_grads(both, q, k, v, weight * own)
        k2, v2 = (jnp.where(own, x, x + 3 * noise) for x in (k, v))
        again = value_and_grads(both, q, k2, v2, weight * own)
    for a, b in zip(ours, again, strict=True):
        np.testing.assert_array_equal(np.where(own, a, 0), np.where(own, b, 0))
    for name, grad in zip("qkv", ours[1:], strict=True):
        assert not np.where(own, 0, grad).any(), name
    monkeypatch.undo()
    plain = functools.partial(causal_attention, window=window)
    alone = value_and_grads(plain, *map(from_border, (q, k, v, weight * own)))
    inside = from_border(own)  # the positions that follow the end see the document, too
    for a, b in zip(ours, alone, strict=True):
        np.testing.assert_allclose(
            from_border(np.where(own, a, 0)), np.where(inside, b, 0), atol=5e-5
        )


def views(params, tokens, config):
    apply = functools.partial(llama.apply, config=config)
    return losses.next_token_losses(apply, params, tokens, chunk_tokens=10_000, entropy=True)


@pytest.mark.parametrize(
    "how",
    [{}, {"remat": "full"}, {"scan_layers": False}, {"window": 40}, {"nope_layers": (1,)},
     {"dtype": "bfloat16"}],
    ids=str,
)  # fmt: skip
def test_losses_of_a_document_do_not_depend_on_the_one_before(how):
    """Not a bit of them, and they are those of a row of its own."""
    config = dataclasses.replace(SHAPE, **how)
    alone = dataclasses.replace(config, separator=None)
    compute = jax.jit(views, static_argnames="config")
    tokens = rows_of()
    both = compute(PARAMS, tokens, config=config)
    other = compute(PARAMS, others_first(tokens), config=config)
    together = compute(PARAMS, tokens, config=alone)
    close = {"bfloat16": 3e-2}.get(config.dtype, 1e-5)
    for ours, theirs, one_text in zip(both, other, together, strict=True):
        np.testing.assert_array_equal(np.where(second(), ours, 0), np.where(second(), theirs, 0))
        assert (ours != theirs)[~second()].mean() > 0.9
        assert np.abs(ours - one_text)[second()].max() > 0.1  # the context makes a difference
    single = compute(PARAMS, from_border(tokens), config=alone)
    for ours, theirs in zip(both, single, strict=True):
        seen = from_border(second())
        np.testing.assert_allclose(from_border(ours)[seen], theirs[seen], atol=close)


@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_of_a_document_do_not_depend_on_the_one_before(top, accumulation):
    """Not a bit, also where blocks go back through the selected tokens only."""
    borders = (5, 128, 300, 7)
    selection = Selection("loss", 0.5, "batch")
    how = SelectedRows(selection, top, SHAPE.n_layers, accumulation > 1) if top else None
    apply = functools.partial(llama.apply, config=SHAPE, rowwise=how)
    method = step.Method(
        apply=apply, ref_apply=apply, tx=KEEP, selection=selection, chunk_tokens=10_000,
        accumulation=accumulation,
    )  # fmt: skip
    params = PARAMS
    tokens = rows_of(borders)
    train_step = jax.jit(functools.partial(step.train_step, method=method))

    def gradient(tokens):
        batch = step.Batch(jnp.asarray(tokens), jnp.asarray(second(borders)))
        return train_step(step.init_state(params, KEEP), None, batch, jax.random.key(0))[
            0
        ].opt_state

    ours, theirs = gradient(tokens), gradient(others_first(tokens, borders))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(ours))


@pytest.mark.parametrize("mesh_shape", [(2, 2, 2), (1, 2, 1, 4)], ids=str)
def test_devices_do_not_change_losses(mesh_shape):
    """Rows over devices, and cut over them: the losses of one device, and bits stay apart."""
    borders = (5, 128, 300, 7)
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    config = dataclasses.replace(SHAPE, batch_axes=sharding.token_axes(mesh))
    params = PARAMS
    tokens, valid = rows_of(borders), second(borders)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        compute = jax.jit(views, static_argnames="config")
        found = [
            compute(placed, sharding.batch_to_devices(batch, mesh).tokens, config=config)
            for batch in (
                {"tokens": rows, "valid": valid} for rows in (tokens, others_first(tokens, borders))
            )
        ]
    one = jax.jit(views, static_argnames="config")(params, tokens, config=SHAPE)
    for many, other, alone in zip(*found, one, strict=True):
        np.testing.assert_array_equal(np.where(valid, many, 0), np.where(valid, other, 0))
        np.testing.assert_allclose(many, alone, atol=1e-5)
