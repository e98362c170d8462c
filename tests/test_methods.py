"""Variants of the method through all stages: references that follow the policy, utilities."""

import functools
import shutil

import jax
import numpy as np
import pytest

from rho1_jax import job, main
from rho1_jax.errors import InputError
from rho1_jax.models import load, weights
from tests import tiny_config
from tests.tiny_config import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text"))


TRAIN = ("prepare", "reference", "score", "train")


def run(texts, folder, stages=TRAIN, **changes):
    config = tiny_config.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({"data.root": str(texts), **changes})
    main.run(config, folder, stages)


def test_history_needs_no_reference_and_resumes_bit_for_bit(texts, tmp_path):
    changes = {"select__decay": 0.5, "select__score": "inverse", "eval__every": 8}
    run(texts, tmp_path, tuple(main.STAGES), **changes)
    assert not (tmp_path / "reference").exists()
    assert not (tmp_path / "scores").exists()
    folder = tmp_path / "checkpoints"
    policy = load.saved_params(folder, weights.on_first_device)
    average = load.saved_params(folder, weights.on_first_device, part="average")
    assert (policy["embed"] != average["embed"]).any()
    shutil.rmtree(folder / "steps" / "8")
    run(texts, tmp_path, ("prepare", "train"), **changes)
    again = load.saved_params(folder, weights.on_first_device)
    jax.tree.map(np.testing.assert_array_equal, again, policy)
    with np.load(tmp_path / "samples.npz") as sample:
        np.testing.assert_array_equal(sample["score"], sample["ref_loss"] - sample["loss"])


def test_a_reference_that_evolves_starts_as_the_reference(texts, tmp_path):
    run(texts, tmp_path, select__decay=1 - 1e-9, select__average_of="reference", train__steps=2)
    assert not (tmp_path / "scores").exists()
    average = load.saved_params(tmp_path / "checkpoints", weights.on_first_device, part="average")
    reference = load.load(tmp_path / "reference")[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), average, reference)


def test_an_average_of_two_shapes_is_one_sentence():
    with pytest.raises(InputError, match="shapes differ"):
        job._average_of({"embed": np.zeros((3, 2))}, {"embed": np.zeros((4, 2))})


def test_relevance_is_cached_and_selects(texts, tmp_path):
    parts = (("excess", 1.0), ("utility", 1.0))
    changes = {"select__score": "combined", "select__parts": parts, "select__utility": "relevance"}
    run(texts, tmp_path, tuple(main.STAGES), **changes)
    cached = np.load(tmp_path / "utility" / "noisy" / "utility.npy")
    done = np.load(tmp_path / "utility" / "noisy" / "done.npy")
    assert np.abs(cached[done]).max() <= 1.001
    assert cached[done].std() > 0.01
    with np.load(tmp_path / "samples.npz") as sample:
        assert sample["utility"].shape == sample["loss"].shape
    with pytest.raises(InputError, match=r"config.select.utility"):
        run(texts, tmp_path, **changes | {"select__utility": "tags:number"})


def test_tags_select_without_a_reference(texts, tmp_path):
    changes = {"select__utility": "tags:number", "train__steps": 2}
    run(texts, tmp_path, select__score="utility", **changes)
    assert not (tmp_path / "reference").exists()
    cached = np.load(tmp_path / "utility" / "noisy" / "utility.npy")
    assert set(cached[np.load(tmp_path / "utility" / "noisy" / "done.npy")].flat) == {0.0, 1.0}
