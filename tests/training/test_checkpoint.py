"""Checkpoints: resharding on load, damage said in a sentence, the reference never on disk."""

import functools

import jax
import numpy as np
import pytest

from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import step
from rho1_jax.training import checkpoint, optimizer, sharding
from rho1_jax.training.checkpoint import Checkpoints

SHAPE = LlamaConfig(
    vocab_size=264, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24
)
TX = optimizer.adamw(lambda _: 1e-2, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0)
BINDING = {"rows": "a", "reference": "b"}


def placed_state(n_devices, seed=0):
    mesh = sharding.make_mesh(n_devices, 1, 1, devices=jax.devices()[:n_devices])
    state = step.init_state(llama.init(SHAPE, jax.random.key(seed)), TX)
    return jax.device_put(state, sharding.state_shardings(state, TX, mesh))


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(folder, state, step_number=1):
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(step_number, state, BINDING)


def test_eight_devices_to_two_bit_for_bit(tmp_path):
    eight, two = placed_state(8), placed_state(2, seed=1)
    save(tmp_path, eight)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract_of(two))
    jax.tree.map(np.testing.assert_array_equal, restored, eight)
    assert len(restored.params["embed"].sharding.device_set) == 2


def test_only_the_last_are_kept(tmp_path):
    state = placed_state(1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, state, BINDING)
        assert checkpoints.latest == 3
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["2", "3"]


def test_other_data_is_refused(tmp_path):
    save(tmp_path, placed_state(1))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.require_binding(BINDING)
        with pytest.raises(InputError, match="trained with other rows"):
            checkpoints.require_binding(BINDING | {"rows": "c"})


def test_damage_is_one_sentence(tmp_path):
    state = placed_state(1)
    save(tmp_path, state)
    for path in (tmp_path / "steps" / "1").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"damaged")
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(InputError, match="cannot be read .* delete that folder"),
    ):
        checkpoints.restore(abstract_of(state))


def test_model_folder_round_trip(tmp_path):
    tok = tokenizer.train(["some text to learn from"] * 3, 264)
    state = placed_state(1)
    checkpoint.write_model_file(tmp_path, SHAPE, tok)
    with pytest.raises(InputError, match="no finished checkpoint"):
        checkpoint.load_model(tmp_path)
    save(tmp_path, state)
    params, shape, loaded = checkpoint.load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert (shape, loaded.fingerprint) == (SHAPE, tok.fingerprint)
    checkpoint.write_model_link(tmp_path / "link", str(tmp_path))
    linked, *_ = checkpoint.load_model(tmp_path / "link", sharding.make_mesh(8, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, linked, state.params)


def test_not_a_model_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="is not a model"):
        checkpoint.load_model(tmp_path)


def test_fingerprint_sees_every_bit_and_order():
    params = {"a": jax.random.normal(jax.random.key(0), (4, 5))}
    same = checkpoint.fingerprint(params)
    changed = params["a"].at[2, 3].multiply(1 + 1e-7)
    swapped = params["a"][::-1]
    found = {checkpoint.fingerprint({"a": x}) for x in (params["a"], changed, swapped)}
    assert same in found
    assert len(found) == 3


def test_sharding_does_not_change_the_fingerprint():
    one, eight = placed_state(1).params, placed_state(8).params
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(eight)


def test_moments_are_saved_too(tmp_path):
    state = placed_state(1)
    grads = jax.tree.map(lambda x: x + 1.0, state.params)
    _, opt_state = TX.update(grads, state.opt_state, state.params)
    state = state._replace(opt_state=opt_state)
    save(tmp_path, state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract_of(state))
    jax.tree.map(
        functools.partial(np.testing.assert_array_equal), restored.opt_state, state.opt_state
    )
