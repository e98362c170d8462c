"""Hugging Face folders: what is read, what is refused, and what loading holds in memory."""

import dataclasses
import functools
import json
import os
import weakref

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rho1_jax.errors import InputError
from rho1_jax.models import llama
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import hf_config, huggingface, weights
from rho1_jax.models.rotary import RopeScaling
from rho1_jax.training import sharding

CONFIG = Architecture(
    vocab_size=24, width=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24,
    tied_head=False,
)  # fmt: skip
SCALINGS = {
    "linear": RopeScaling("linear", 2.0, 2048),
    "dynamic": RopeScaling("dynamic", 2.0, 2048),
    "llama3": RopeScaling("llama3", 8.0, 512, low=1.0, high=4.0),
    "yarn": RopeScaling("yarn", 4.0, 512, low=1.0, high=32.0, attention_factor=1.1, truncate=False),
}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), weights.shapes(CONFIG))


@pytest.fixture
def folder(params, tmp_path):
    huggingface.save(tmp_path, params, CONFIG, dtype="float32", more={})
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / huggingface.WEIGHTS_FILE
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("in_files_of", [10**9, 3000])
def test_round_trip_is_bitwise(params, tmp_path, monkeypatch, in_files_of):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", in_files_of)
    huggingface.save(tmp_path, params, CONFIG, dtype="float32", more={"eos_token_id": 3})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) == (in_files_of == 3000)
    assert all(f.stat().st_size < in_files_of + 2000 for f in files)
    loaded, config = huggingface.load(tmp_path)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_straight_into_shards(params, folder):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    place = functools.partial(sharding.parameter_shardings, mesh=mesh)
    loaded, _ = huggingface.load(folder, place)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == place(params)


def test_one_matrix_at_a_time_is_on_the_host(folder, monkeypatch):
    """What the reader made is gone when it makes the next matrix."""
    alive, most = [], []
    assemble = weights.assemble

    def watched(config, find, place):
        def find_and_count(name, layer):
            most.append(sum(a() is not None for a in alive))
            read = find(name, layer)

            def reader(index):
                array = read(index)
                if layer is not None:  # the others may become part of the result as they are
                    alive.append(weakref.ref(array if array.base is None else array.base))
                return array

            return reader

        return assemble(config, find_and_count, place)

    monkeypatch.setattr(weights, "assemble", watched)
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    huggingface.load(folder, functools.partial(sharding.parameter_shardings, mesh=mesh))
    assert len(most) == 9 * 3 + 3
    # Eight parts of the matrix before may still be on their way to their devices.
    assert max(most) <= 8


def test_numbers_stored_in_other_widths(params, folder):
    edit_tensors(folder, lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    loaded, _ = huggingface.load(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("f2")), loaded, params)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_a_head_stored_twice_and_old_rotary_tables_are_fine(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: np.ones(4, "f4")}))
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"'lm_head\.weight' has no place"):
        huggingface.load(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    loaded, config = huggingface.load(folder)
    assert config.tied_head
    assert "head" not in loaded


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), rf"no tensor '{UP}'"),
        (lambda t: t.update({UP: t[UP][:-1].copy()}), rf"'{UP}' is \(23, 16\) where .* \(24, 16\)"),
        (lambda t: t.update({NORM: t[NORM].astype(np.int8)}), rf"'{NORM}' is stored as I8"),
        (
            lambda t: t.update({UP.replace("weight", "bias"): np.ones(24, "f4")}),
            r"'model\.layers\.1\.mlp\.up_proj\.bias' has no place",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        huggingface.load(folder)


def test_damaged_and_absent_files_are_named(params, folder, monkeypatch):
    whole = (folder / huggingface.WEIGHTS_FILE).read_bytes()
    for n in (0, 5, 200, len(whole) - 4):
        (folder / huggingface.WEIGHTS_FILE).write_bytes(whole[:n])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short"):
            huggingface.load(folder)
    (folder / huggingface.WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
        huggingface.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle, which can run any prog"):
        huggingface.load(folder)

    monkeypatch.setattr(huggingface, "SHARD_BYTES", 3000)
    huggingface.save(folder, params, CONFIG, dtype="float32", more={})
    first = sorted(folder.glob("model-*"))[0]
    save_file({"other": np.ones(3, "f4")}, first)
    with pytest.raises(InputError, match=rf"{first.name} lacks '.*', which .*index\.json places"):
        huggingface.load(folder)
    first.unlink()
    with pytest.raises(InputError, match=rf"index\.json names {first.name}, which is not there"):
        huggingface.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"sliding_window": 7}, "sliding_window=7 is not supported"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope.* is not known"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks 'factor'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
            "rope_scaling.beta_fast is not supported for 'linear'",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            "some layers and not to others",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "some layers and not to others",
        ),
    ],
    ids=str,
)
def test_options_that_are_not_supported_are_named(folder, change, message):
    edit(folder, **change)
    with pytest.raises(InputError, match=message) as error:
        huggingface.load(folder)
    assert str(folder / "config.json") in str(error.value)


def test_what_older_and_sparser_files_mean(folder):
    """transformers' defaults, where a key is missing; an explicit null is no window."""
    described = {
        "model_type": "mistral", "vocab_size": 24, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 16, "intermediate_size": 24, "torch_dtype": "bfloat16",
        "use_cache": True, "rope_interleaved": False,
    }  # fmt: skip
    sparse = hf_config.read(described, folder)
    assert (sparse.n_kv_heads, sparse.head_dim, sparse.window) == (8, 4, 4096)
    assert (sparse.norm_eps, sparse.rope_theta, sparse.tied_head) == (1e-6, 1e4, False)
    assert hf_config.read(described | {"sliding_window": None}, folder).window is None
    smol = hf_config.read(described | {"model_type": "smollm3", "num_hidden_layers": 9}, folder)
    assert (smol.nope_layers, smol.rope_theta, smol.tied_head) == ((3, 7), 2e6, True)
    assert hf_config.read(described | {"model_type": "qwen3"}, folder).head_dim == 128


@pytest.mark.parametrize(
    "special",
    [
        *({"rope_scaling": s} for s in SCALINGS.values()),
        {"window": 9}, {"qkv_bias": True}, {"qk_norm": True, "window": 9}, {"nope_layers": (1,)},
    ],
    ids=str,
)  # fmt: skip
def test_shapes_survive_json(special):
    config = dataclasses.replace(CONFIG, **special)
    described = json.loads(json.dumps(hf_config.describe(config)))
    assert hf_config.read(described, "config.json") == config
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert Architecture.from_json(stored) == config
    assert hash(Architecture.from_json(stored)) == hash(config)


def test_a_shape_that_transformers_lacks_is_not_exported():
    config = dataclasses.replace(CONFIG, qk_norm=True, nope_layers=(1,))
    with pytest.raises(InputError, match="is qwen3 and smollm3 at once"):
        hf_config.describe(config)


@pytest.mark.parametrize("kind", SCALINGS)
def test_impossible_scalings_are_refused(kind):
    with pytest.raises(InputError, match="makes no sense"):
        dataclasses.replace(SCALINGS[kind], factor=0.5)
    with pytest.raises(InputError, match="nope_layers"):
        dataclasses.replace(CONFIG, nope_layers=(3,))


def test_every_rule_is_used_by_a_model_that_has_everything():
    everything = dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    tree = weights.shapes(everything)
    sharding.parameter_shardings(tree, mesh)
    names = ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern, _ in sharding.OPTIONAL_RULES:
        assert any(sharding.re.search(pattern, name) for name in names)
    assert llama.param_count(everything) == sum(x.size for x in jax.tree.leaves(tree))


def test_a_file_has_the_mode_of_the_umask(params, tmp_path):
    before = os.umask(0o022)
    try:
        for _ in range(2):  # new, and over an old one
            huggingface.save(tmp_path, params, CONFIG, dtype="float32", more={})
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
            assert modes == dict.fromkeys(("config.json", "model.safetensors"), 0o644)
            (tmp_path / "model.safetensors").chmod(0o600)
    finally:
        os.umask(before)
