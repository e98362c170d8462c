"""Checkpoints: resharding on load, damage said in a sentence, the reference never on disk."""

import dataclasses
import errno
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import load
from rho1_jax.slm import step
from rho1_jax.training import checkpoint, optimizer, sharding
from rho1_jax.training.checkpoint import Checkpoints

SHAPE = Architecture(
    vocab_size=264, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24
)
TX = optimizer.of("adamw", lambda _: 1e-2, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0)
BINDING = {"rows": "a", "reference": "b"}


def placed_state(n_devices, seed=0):
    mesh = sharding.make_mesh(n_devices, 1, 1, devices=jax.devices()[:n_devices])
    state = step.init_state(llama.init(SHAPE, jax.random.key(seed)), TX)
    return jax.device_put(state, sharding.state_shardings(state, mesh))


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


def test_any_kept_step_of_a_run_is_a_model(tmp_path, monkeypatch):
    states = [placed_state(1, seed) for seed in (0, 1)]
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as checkpoints:
        for number, state in zip((3, 7), states, strict=True):
            checkpoints.save(number, state, BINDING)
    tok = tokenizer.train(["some text"], 264)
    shape = dataclasses.replace(SHAPE, vocab_size=tok.vocab_size)
    checkpoint.write_model_file(tmp_path / "run" / "checkpoints", shape, tok)
    monkeypatch.chdir(tmp_path)
    checkpoint.write_model_link(tmp_path / "link", "run@3")
    monkeypatch.chdir("/")
    run = str(tmp_path / "run")
    for source, state in ((f"{run}@3", 0), (f"{run}@7", 1), (run, 1), (tmp_path / "link", 0)):
        params = checkpoint.load_model(source)[0]
        jax.tree.map(np.testing.assert_array_equal, params, states[state].params)
    assert load.describe(f"{run}@3").digest != load.describe(run).digest
    with pytest.raises(InputError, match=r"no checkpoint of step 5: it has those of 3, 7"):
        load.describe(f"{run}@5")
    with pytest.raises(InputError, match=r"names a step of .*nowhere, but that is no run"):
        load.describe(tmp_path / "nowhere@5")


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


def flip_a_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def weights_of(folder, step_number):
    """The file with most of a checkpoint's bytes."""
    files = (p for p in (folder / "steps" / str(step_number)).rglob("*") if p.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def damage_a_weight(folder, step_number):
    path = weights_of(folder, step_number)
    flip_a_bit(path, path.stat().st_size * 2 // 3)


def truncate_the_weights(folder, step_number):
    weights_of(folder, step_number).write_bytes(b"damaged")


def truncate_the_metadata(folder, step_number):
    path = folder / "steps" / str(step_number) / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes()[:100])


def change_a_digest(folder, step_number):
    """Of the step's number, which a model that is loaded does not read."""
    path = folder / "steps" / str(step_number) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"step": "', '"step": "f', 1))


def rename_a_digest(folder, step_number):
    path = folder / "steps" / str(step_number) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"params": "', '"qarams": "', 1))


def change_the_binding(folder, step_number):
    path = folder / "steps" / str(step_number) / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"rows": "a"', '"rows": "e"'))


@pytest.mark.parametrize(
    "damage",
    [
        damage_a_weight,
        truncate_the_weights,
        truncate_the_metadata,
        change_the_binding,
        change_a_digest,
        rename_a_digest,
    ],
)
def test_a_damaged_newest_is_put_aside(damage, tmp_path, caplog, capfd):
    state, newer = placed_state(1), placed_state(1, seed=1)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for number, saved in ((1, state), (2, newer), (3, newer)):
            checkpoints.save(number, saved, BINDING)
    damage(tmp_path, 3)
    damage(tmp_path, 2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.require_binding(BINDING)
        restored = checkpoints.restore(abstract_of(state))
        assert checkpoints.latest == 1
        checkpoints.save(2, newer, BINDING)  # the way goes on from there
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    warnings = [r.getMessage() for r in caplog.records if r.name == "rho1_jax"]
    assert len(warnings) == 2
    assert all("It is put aside, in" in warning for warning in warnings)
    assert len(list((tmp_path / "damaged").iterdir())) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_while_one_is_put_aside_loses_nothing(tmp_path, monkeypatch):
    state = placed_state(1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state, BINDING)
    damage_a_weight(tmp_path, 2)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        monkeypatch.setattr(Path, "mkdir", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.restore(abstract_of(state))
        monkeypatch.undo()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract_of(state))
        assert checkpoints.latest == 1
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["2-0"]


def test_description_opens_no_array(tmp_path, monkeypatch):
    checkpoint.write_model_file(tmp_path, SHAPE, tokenizer.train(["a b"] * 9, 264))
    save(tmp_path, placed_state(1))
    monkeypatch.setattr(ocp.training.Checkpointer, "metadata", None)
    truncate_the_weights(tmp_path, 1)
    assert load.describe(tmp_path).architecture == SHAPE


def test_what_no_older_step_can_do_is_not_the_newest_ones_fault(tmp_path):
    state = placed_state(1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state, BINDING)
    other = abstract_of(state)._replace(params={"other": jax.ShapeDtypeStruct((3,), "float32")})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(InputError, match=r"steps/2 cannot be read"):
            checkpoints.restore(other)
        assert checkpoints.latest == 2


def test_one_bit_of_a_model_is_seen(tmp_path):
    checkpoint.write_model_file(tmp_path, SHAPE, tokenizer.train(["text"], 264))
    save(tmp_path, placed_state(1))
    damage_a_weight(tmp_path, 1)
    described = load.describe(tmp_path)
    with pytest.raises(InputError, match="steps/1 is damaged: params is not bit for bit"):
        described.params()


def test_a_model_folder_describes_itself(tmp_path, monkeypatch):
    """Also through a link; its digest is the fingerprint that would be computed."""
    tok, state = tokenizer.train(["some text to learn from"] * 3, 264), placed_state(1)
    checkpoint.write_model_file(tmp_path / "model", SHAPE, tok)
    save(tmp_path / "model", state)
    checkpoint.write_model_link(tmp_path / "link", str(tmp_path / "model"))
    monkeypatch.setattr(load, "saved_params", lambda *_: pytest.fail("a weight was read"))
    for name in ("model", "link"):
        found = load.describe(tmp_path / name)
        assert found.architecture == SHAPE
        assert found.tokenizer.fingerprint == tok.fingerprint
        assert found.digest == checkpoint.fingerprint(state.params)


@pytest.mark.parametrize("name", ["model.json", "tokenizer.json"])
def test_a_damaged_description_is_named(name, tmp_path):
    checkpoint.write_model_file(tmp_path, SHAPE, tokenizer.train(["text"], 264))
    save(tmp_path, placed_state(1))
    path = tmp_path / name
    path.write_text(path.read_text().replace('"rope_theta": 1', '"rope_theta": 2') + " ")
    if name == "model.json":
        assert Architecture.from_json(jsonfile.read(path)["config"]) != SHAPE
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        load.describe(tmp_path)


def test_checkpoints_without_digests_are_accepted(tmp_path):
    """Those of earlier versions; the files tell such models apart."""
    state = placed_state(1)
    checkpoint.write_model_file(tmp_path, SHAPE, tokenizer.train(["text"], 264))
    model_file = jsonfile.read(tmp_path / "model.json")
    jsonfile.write(tmp_path / "model.json", {"config": model_file["config"]})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints._orbax.save(1, state, force=True, custom_metadata=BINDING)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.require_binding(BINDING)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract_of(state)), state)
    found = load.describe(tmp_path)
    assert len(found.digest) == 64
    jax.tree.map(np.testing.assert_array_equal, found.params(), state.params)


def test_a_state_that_is_not_finite_is_refused(tmp_path):
    state = placed_state(1)
    broken = {**state.params, "final_norm": state.params["final_norm"].at[0].set(np.inf)}
    checkpoint.write_model_file(tmp_path, SHAPE, tokenizer.train(["text"], 264))
    save(tmp_path, state._replace(params=broken))
    with pytest.raises(InputError, match="steps/1 holds parameters that are not finite"):
        checkpoint.load_model(tmp_path)


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


@pytest.mark.parametrize("folders", ["a", "ab", "abc"])
def test_links_in_a_circle_are_one_sentence(tmp_path, folders):
    for folder, other in zip(folders, folders[1:] + folders[0], strict=True):
        (tmp_path / other).mkdir(exist_ok=True)
        checkpoint.write_model_link(tmp_path / folder, str(tmp_path / other))
    with pytest.raises(InputError, match=r"/a stands for .*, which leads back to it: name a model"):
        load.describe(tmp_path / "a")


def test_not_a_model_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="is not a model"):
        checkpoint.load_model(tmp_path)


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
