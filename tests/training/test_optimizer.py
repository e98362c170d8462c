"""Optimizers and schedules: by hand where that can be, and with what a run needs of their states:
bad steps change nothing, and a restored state is the saved one, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.config_schema import ENTRIES
from rho1_jax.models import llama
from rho1_jax.models.architecture import Architecture
from rho1_jax.slm import step
from rho1_jax.slm.selection import Selection
from rho1_jax.slm.step import Batch
from rho1_jax.training import optimizer
from rho1_jax.training.checkpoint import Checkpoints

SHAPE = Architecture(
    vocab_size=264, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24
)
RATE = 0.5
OF = {"b1": 0.9, "b2": 0.95, "clip": 1.0}


def test_the_configs_names_are_those_there_are():
    allowed = {entry.key: entry.kind for entry in ENTRIES}
    for section in ("reference", "train"):
        assert set(allowed[f"{section}.optimizer"].names) == set(optimizer.OPTIMIZERS)
        assert set(allowed[f"{section}.schedule"].names) == set(optimizer.SCHEDULES)


@pytest.mark.parametrize(
    ("name", "decay_steps", "after"),  # the learning rate of steps 4 to 10, over the peak
    [
        ("cosine", 0, [0.1 + 0.9 * (1 + np.cos(np.pi * n / 6)) / 2 for n in range(7)]),
        ("linear", 0, [1 - 0.9 * n / 6 for n in range(7)]),
        ("constant", 0, [1.0] * 7),
        ("wsd", 2, [1, 1, 1, 1, 1, 0.55, 0.1]),
    ],
)
def test_learning_rates_by_hand(name, decay_steps, after):
    schedule = optimizer.schedule(name, 0.5, 4, 10, 0.1, decay_steps)
    expected = 0.5 * np.array([0, 0.25, 0.5, 0.75, *after])
    np.testing.assert_allclose([schedule(n) for n in range(11)], expected, rtol=1e-6)


def test_without_warmup_the_first_step_has_the_peak():
    assert float(optimizer.schedule("wsd", 0.5, 0, 10, 0.0, 4)(0)) == 0.5


def parameters_and_gradients():
    params = llama.init(SHAPE, jax.random.key(0))
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return params, jax.tree.unflatten(form, drawn)


def update(name, grads, params, weight_decay=0.0):
    tx = optimizer.of(name, lambda _: RATE, weight_decay=weight_decay, **OF)
    return jax.jit(lambda grads: tx.update(grads, tx.init(params), params)[0])(grads)


def test_muon_makes_each_layers_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    params, grads = parameters_and_gradients()
    muon, adamw = update("muon", grads, params), update("adamw", grads, params)
    jax.tree.map(np.testing.assert_array_equal, muon["embed"], adamw["embed"])
    for name in ("attn_norm", "mlp_norm"):
        np.testing.assert_array_equal(muon["layers"][name], adamw["layers"][name])
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        singular = np.linalg.svd(muon["layers"][name], compute_uv=False)  # [L, n], descending
        singular /= (
            RATE * 0.2 * max(muon["layers"][name].shape[1:]) ** 0.5
        )  # about 1, but for the least
        assert (singular < 1.3).all()
        assert (singular[:, 3 * singular.shape[1] // 4 - 1] > 0.6).all()


def test_a_layers_update_is_its_own():
    params, grads = parameters_and_gradients()
    other = jax.tree.map(jnp.copy, grads)
    other["layers"] = {name: g.at[1].multiply(3.0) for name, g in grads["layers"].items()}
    first, second = (update("muon", g, params)["layers"]["down"][0] for g in (grads, other))
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_weight_decay_is_decoupled_and_of_matrices_only(name):
    params, _ = parameters_and_gradients()
    updates = update(name, jax.tree.map(jnp.zeros_like, params), params, weight_decay=0.25)
    expected = jax.tree.map(lambda p: -0.25 * RATE * p, params)
    for norms in (expected, expected["layers"]):
        norms |= {k: 0 * x for k, x in norms.items() if k.endswith("norm")}
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), updates, expected)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_bad_steps_change_nothing_and_a_restored_state_goes_on_bit_for_bit(name, tmp_path):
    tx = optimizer.of(name, lambda _: 1e-2, weight_decay=0.1, moments_dtype="bfloat16", **OF)
    apply = functools.partial(llama.apply, config=SHAPE.computed())
    method = step.Method(apply, apply, tx, Selection("loss", 0.5), 64, accumulation=2)
    train = jax.jit(functools.partial(step.train_step, method=method))
    state = step.init_state(llama.init(SHAPE, jax.random.key(0)), tx)

    def batch(seed):
        tokens = np.random.default_rng(seed).integers(0, 264, (2, 9)).astype(np.int32)
        return Batch(jnp.asarray(tokens), jnp.ones((2, 8), bool))

    def after(state, seed):
        return train(state, None, batch(seed), jax.random.key(0))[0]

    first = after(state, 0)
    broken = first._replace(params=first.params | {"final_norm": jnp.full(16, jnp.nan)})
    jax.tree.map(np.testing.assert_array_equal, after(broken, 1)._replace(step=first.step), broken)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, first, {})
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), first)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract)
    jax.tree.map(np.testing.assert_array_equal, after(restored, 2), after(first, 2))
