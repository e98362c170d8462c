"""The table of rules, and eight devices equal one: losses, masks and updated parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rho1_jax.errors import InputError
from rho1_jax.models import llama
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import step
from rho1_jax.slm.selection import Selection
from rho1_jax.training import optimizer, sharding

SHAPE = LlamaConfig(
    vocab_size=32, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24,
    tied_head=False, batch_axes=sharding.BATCH_AXES,
)  # fmt: skip
OF = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip": 1.0}
TX = optimizer.of("adamw", lambda _: 1e-2, **OF)
WIDE = dataclasses.replace(SHAPE, width=128, head_dim=32, ffn_width=160)  # Adafactor factors these


def host_batch(rows=8, seq_len=12):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (rows, seq_len + 1)).astype(np.int32)
    valid = np.arange(seq_len) < rng.integers(1, seq_len + 1, (rows, 1))
    return {"tokens": tokens, "valid": valid}


def two_steps(mesh_shape, selection, *, batch=None, accumulation=1, tx=TX, shape=SHAPE):
    """Losses and parameters after two steps on a mesh of the first devices."""
    n = int(np.prod(mesh_shape))
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[:n])
    with jax.set_mesh(mesh):
        params, ref = (llama.init(shape, jax.random.key(i)) for i in (0, 1))
        abstract = jax.eval_shape(functools.partial(step.init_state, tx=tx), params)
        shardings = sharding.state_shardings(abstract, mesh)
        state = jax.device_put(step.init_state(params, tx), shardings)
        ref = jax.device_put(ref, shardings.params)
        apply = functools.partial(llama.apply, config=shape)
        fn = jax.jit(
            functools.partial(
                step.train_step,
                method=step.Method(apply, apply, tx, selection, 40, accumulation),
            ),
            out_shardings=(shardings, None),
        )  # fmt: skip
        for _ in range(2):
            placed = sharding.batch_to_devices(batch or host_batch(), mesh)
            state, metrics = fn(state, ref, placed, jax.random.key(3))
        assert state.params["layers"]["q"].sharding.is_equivalent_to(
            shardings.params["layers"]["q"], 3
        )
        return jax.tree.map(np.asarray, (metrics, state.params))


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("score", ["excess", "random"])
def test_eight_devices_equal_one(mesh_shape, score):
    selection = Selection(score, 0.4)
    one, eight = (two_steps(shape, selection) for shape in ((1, 1, 1), mesh_shape))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, eight)


@pytest.mark.parametrize(("name", "dtype"), [("muon", "float32"), ("adafactor", "bfloat16")])
def test_eight_devices_equal_one_with_every_optimizer(name, dtype):
    """In bfloat16 a moment's last digit may fall either way: 1/256 of an update of 1e-2."""
    tx = optimizer.of(name, lambda _: 1e-2, moments_dtype=dtype, **OF)
    how = {"tx": tx, "shape": WIDE, "batch": host_batch(rows=16)}
    one = two_steps((1, 1, 1), Selection("excess", 0.4), **how)
    many = two_steps((2, 2, 2), Selection("excess", 0.4), accumulation=2, **how)
    atol = 2e-5 if dtype == "float32" else 1e-4
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=atol), one, many)
    before = llama.init(WIDE, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[1], before)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_accumulation_on_eight_devices_equals_one_batch_on_one():
    batch = host_batch(rows=16)
    one = two_steps((1, 1, 1), Selection("excess", 0.4), batch=batch)
    many = two_steps((4, 2, 1), Selection("excess", 0.4), batch=batch, accumulation=2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, many)


def abstract_params(shape=SHAPE):
    return jax.eval_shape(lambda: llama.init(shape, jax.random.key(0)))


@pytest.fixture
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_each_parameter_has_a_rule_and_moments_follow(mesh):
    abstract = jax.eval_shape(functools.partial(step.init_state, tx=TX), abstract_params())
    shardings = sharding.state_shardings(abstract, mesh)
    jax.tree.map(lambda a, s: s.shard_shape(a.shape), abstract, shardings)  # all divide
    moments = [
        s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings.opt_state)
        if "'down'" in jax.tree_util.keystr(path)
    ]  # fmt: skip
    assert moments == [P(None, "tensor", ("fsdp", "sequence"))] * 2


def test_states_of_every_optimizer_lie_on_their_part_of_the_devices(mesh):
    """A moment of a parameter's shape lies as it does; what is smaller, on every device."""
    found = {}
    for name in optimizer.OPTIMIZERS:
        tx = optimizer.of(name, lambda _: 1e-2, moments_dtype="bfloat16", **OF)
        params = abstract_params(WIDE)
        abstract = jax.eval_shape(functools.partial(step.init_state, tx=tx), params)
        placed = sharding.placed(abstract, sharding.state_shardings(abstract, mesh)).opt_state
        found[name] = {
            jax.tree_util.keystr(path).split("].")[-1]: (x.shape, str(x.dtype), x.sharding.spec)
            for path, x in jax.tree_util.tree_leaves_with_path(placed)
            if "'down'" in jax.tree_util.keystr(path)
        }
    down, there = (2, 160, 128), P(None, "tensor", ("fsdp", "sequence"))
    key = "['layers']['down']"
    assert found["adamw"] == {
        f"mu{key}": (down, "bfloat16", there), f"nu{key}": (down, "float32", there)
    }  # fmt: skip
    assert found["muon"] == {f"mu{key}": (down, "bfloat16", there)}
    assert found["adafactor"] == {
        f"v_row{key}": ((2, 128), "float32", P()), f"v_col{key}": ((2, 160), "float32", P()),
        f"v{key}": ((1,), "float32", P()), f"ema{key}": (down, "bfloat16", there),
    }  # fmt: skip


def test_parameter_without_a_rule_is_an_error(mesh):
    params = abstract_params() | {"bias": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(InputError, match="No sharding rule matches parameter bias"):
        sharding.parameter_shardings(params, mesh)


def test_rule_without_a_parameter_is_an_error(mesh):
    params = abstract_params()
    del params["layers"]["o"], params["layers"]["down"]
    with pytest.raises(InputError, match="matches no parameter"):
        sharding.parameter_shardings(params, mesh)


def test_size_that_does_not_divide_is_an_error(mesh):
    odd = dataclasses.replace(SHAPE, vocab_size=33)
    with pytest.raises(InputError, match="embed .* does not divide over mesh.tensor = 2"):
        sharding.parameter_shardings(abstract_params(odd), mesh)


def test_mesh_that_does_not_fit_the_devices_is_an_error():
    with pytest.raises(InputError, match="mesh.data=3 .* 8 devices"):
        sharding.make_mesh(data=3, fsdp=1, tensor=1)
    sizes = {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert dict(sharding.make_mesh(-1, 2, 1).shape) == sizes


def test_batch_that_does_not_divide_is_an_error(mesh):
    sharding.require_divisible(8, 2, mesh, "train")
    with pytest.raises(InputError, match="train.batch_size=6 .* multiple of 8"):
        sharding.require_divisible(6, 2, mesh, "train")


def test_what_cannot_be_cut_along_the_rows_is_an_error():
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=1, sequence=4)
    sharding.require_even_cut(64, mesh)
    with pytest.raises(InputError, match="seq_len=66 .* mesh.sequence: make it a multiple of 4"):
        sharding.require_even_cut(66, mesh)
    sharding.require_divisible(8, 4, mesh, "train")
    more = "more than one row at a time for each 4 devices of mesh.sequence: set it to"
    with pytest.raises(InputError, match=f"{more} 4, or train.accumulation to 4."):
        sharding.require_divisible(8, 2, mesh, "train")
    with pytest.raises(InputError, match=f"score.batch_size=8 is {more} 2\\."):
        sharding.require_divisible(8, 1, mesh, "score")


@pytest.mark.parametrize(
    ("hosts", "tensor", "parts"),
    [
        ([0, 0], 1, [((0,), 1)]),
        ([0, 0, 1, 1], 1, [((0,), 2), ((1,), 2)]),
        # As a slice's hosts lie in a mesh over its torus.
        ([0, 0, 1, 1, 0, 0, 1, 1], 1, [((0, 2), 4), ((1, 3), 4)]),
        ([0, 1, 2, 3], 2, [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]),  # tensor over two hosts
        ([0, 1, 1, 0], 1, [((0, 3), 4), ((1, 2), 4)]),
    ],
)
def test_hosts_read_all_rows_once_or_share_them(hosts, tensor, parts):
    holders = np.array(hosts).reshape(-1, tensor)
    assert [sharding.parts_of(holders, host) for host in range(len(parts))] == parts


def test_a_tensor_axis_that_cuts_unevenly_is_an_error():
    holders = np.repeat([0, 1, 2], 4).reshape(4, 3)
    with pytest.raises(InputError, match="mesh.tensor = 3 cuts across the hosts unevenly"):
        sharding.parts_of(holders, 0)
