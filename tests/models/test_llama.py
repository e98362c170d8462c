import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec

from rho1_jax.errors import InputError
from rho1_jax.models import llama

SMALL = llama.LlamaConfig(
    vocab_size=200, width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=48
)


def small(**changes) -> llama.LlamaConfig:
    return dataclasses.replace(SMALL, **changes)


@functools.partial(jax.jit, static_argnames="config")
def logits(params, tokens, config):
    hidden, head = llama.apply(params, tokens, config=config)
    return jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)


@pytest.fixture(scope="module")
def params():
    # Five times the usual scale, so that every part matters to the output.
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, llama.init(SMALL, jax.random.key(0)))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 24), 0, SMALL.vocab_size)


@pytest.mark.parametrize("window", [None, 3, 40])
def test_hidden_depends_on_exactly_the_visible_positions(params, window):
    config = small(window=window)
    tokens = jnp.arange(150)[None]  # all different: embedding row t is the input at position t
    direction = jax.random.normal(jax.random.key(2), (config.width,))

    @jax.jit
    def gradient_to_inputs(t):
        def projected(embed):
            hidden, _ = llama.apply(params | {"embed": embed}, tokens, config=config)
            return hidden[0, t] @ direction

        return jax.grad(projected)(params["embed"])[:150]

    for t in (0, 4, 127, 128, 149):
        seen = np.flatnonzero(np.abs(gradient_to_inputs(t)).max(axis=-1))
        reach = 150 if window is None else config.n_layers * (window - 1)
        np.testing.assert_array_equal(seen, np.arange(max(0, t - reach), t + 1))


@pytest.mark.parametrize("tied", [True, False])
def test_tree_and_param_count(tied):
    config = small(tied_head=tied)
    shapes = jax.tree.map(jnp.shape, llama.init(config, jax.random.key(0)))
    expected = {
        "embed": (200, 32),
        "layers": {
            "attn_norm": (2, 32),
            "q": (2, 32, 32),
            "k": (2, 32, 16),
            "v": (2, 32, 16),
            "o": (2, 32, 32),
            "mlp_norm": (2, 32),
            "gate": (2, 32, 48),
            "up": (2, 32, 48),
            "down": (2, 48, 32),
        },
        "final_norm": (32,),
    }
    assert shapes == expected | ({} if tied else {"head": (200, 32)})
    sizes = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    assert llama.param_count(config) == sum(map(np.prod, sizes))


def test_initial_scales():
    config = small(width=128, n_layers=8, ffn_width=256, tied_head=False)
    params = llama.init(config, jax.random.key(0))
    layers = params["layers"]
    for name in ("attn_norm", "mlp_norm"):
        np.testing.assert_array_equal(layers[name], 1)
    np.testing.assert_array_equal(params["final_norm"], 1)
    for array in (params["embed"], params["head"], *(layers[n] for n in "qkv")):
        assert np.std(array) == pytest.approx(0.02, rel=0.03)
    for name in ("o", "down"):
        assert np.std(layers[name]) == pytest.approx(0.02 / 4, rel=0.03)  # sqrt(2 * 8 layers)
    assert not np.allclose(layers["q"][0], layers["q"][1])  # each layer has its own draw


def multiply_adds(jaxpr) -> int:
    """Multiply-adds of all matrix products, those inside a scan times its length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            total += int(depth * np.prod(equation.outvars[0].aval.shape))
        inner = sum(multiply_adds(j) for j in jaxprs_in_params(equation.params))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_traced_products(params, tied):
    config, seq_len = small(tied_head=tied, n_layers=3), 100  # one block: attention is dense
    params = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, seq_len), jnp.int32)
    traced = jax.make_jaxpr(lambda p, t: logits(p, t, config))(params, tokens)
    assert llama.flops_per_token(config, seq_len) * 4 * seq_len == 2 * multiply_adds(traced.jaxpr)


def test_flops_count_no_keys_beyond_the_window():
    assert llama.flops_per_token(small(window=50), 100) == llama.flops_per_token(small(), 50)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        {"remat": "dots"},
        {"remat": "full"},
        {"remat": "full", "scan_layers": False},
    ],
    ids=str,
)
def test_scan_and_remat_change_nothing(params, tokens, changes):
    def value_and_grad(config):
        def loss(params):
            return jax.nn.logsumexp(logits(params, tokens, config), axis=-1).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = value_and_grad(SMALL)
    other_value, other_grads = value_and_grad(small(**changes))
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, other_grads)


@pytest.mark.parametrize(("remat", "recomputed"), [("none", 0), ("dots", 2), ("full", 8)])
def test_remat_recomputes_products_as_named(params, tokens, remat, recomputed):
    """ "full" repeats the block's nine products but the last, whose value no gradient needs;
    "dots" repeats the two inside attention, which have a batch dimension."""

    def products(config):
        loss = lambda p: llama.apply(p, tokens, config=config)[0].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")

    assert products(small(remat=remat)) == products(SMALL) + recomputed


def test_bfloat16_is_close_to_float32(tokens):
    params = llama.init(SMALL, jax.random.key(0))
    exact = logits(params, tokens, SMALL)
    config = small(dtype="bfloat16")
    hidden, head = jax.eval_shape(lambda p, t: llama.apply(p, t, config=config), params, tokens)
    assert hidden.dtype == head.dtype == jnp.bfloat16
    rounded = logits(params, tokens, config)
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.02
    grad = jax.eval_shape(jax.grad(lambda p: logits(p, tokens, config).sum()), params)
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype("float32")}


def test_tied_head_is_the_embedding(params, tokens):
    _, head = jax.jit(lambda p, t: llama.apply(p, t, config=SMALL))(params, tokens)
    np.testing.assert_array_equal(head, params["embed"])


def test_batch_axes_spread_the_batch_and_change_nothing():
    params = llama.init(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, SMALL.vocab_size)
    config = small(batch_axes=("data", "fsdp"))
    expected = jax.jit(lambda p, t: llama.apply(p, t, config=SMALL)[0])(params, tokens)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)):
        hidden = jax.jit(lambda p, t: llama.apply(p, t, config=config)[0])(params, tokens)
        assert hidden.sharding.is_equivalent_to(
            jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec(("data", "fsdp"))), 3
        )
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads=4 is no multiple of n_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"window": 0}, "window=0"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"remat": "some"}, "remat='some'"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        small(**change)
