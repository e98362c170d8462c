"""Variants of the method through all stages: references that follow the policy, utilities."""

import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rho1_jax import main
from rho1_jax.errors import InputError
from rho1_jax.models.formats import load, weights
from rho1_jax.pipeline import models
from rho1_jax.slm import outside
from tests import tiny_config

ROOT = Path(__file__).parent.parent
STAGES = ("prepare", "reference", "score", "train", "evaluate")


def run(texts, folder, stages=STAGES, mixed=False, **changes):
    config = tiny_config.get_config()
    if mixed:
        with config.unlocked():
            config.data.corpus.clean = config.data.clean.clean
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    changes |= {"data.root": str(texts), "train.steps": 4, "eval.every": 4}
    config.update_from_flattened_dict(changes)
    main.run(config, folder, stages)


def cached_utility(folder):
    """The values that were computed."""
    place = folder / "utility" / "noisy"
    return np.load(place / "utility.npy")[np.load(place / "checks.npy").all(axis=1)]


def test_history_and_tags_need_no_reference_and_resume_bit_for_bit(texts, tmp_path, monkeypatch):
    """With a score from outside, whose source the run is bound to."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    own = shutil.copy(ROOT / "docs/examples/relative.py", tmp_path / "own_score_of_a_run.py")
    parts = (("own_score_of_a_run:relative", -1.0), ("utility", 1.0))
    changes = {"select__score": "combined", "select__parts": parts, "select__ref_ema_decay": 0.5}
    changes["select__utility"] = "tags:number"
    run(texts, tmp_path, **changes)
    assert not (tmp_path / "reference").exists()
    assert not (tmp_path / "scores").exists()
    assert set(cached_utility(tmp_path).flat) == {0.0, 1.0}
    with np.load(tmp_path / "samples.npz") as sample:  # judged by the average that training left
        assert sample["ref_loss"].shape == sample["utility"].shape == sample["loss"].shape

    folder = tmp_path / "checkpoints"
    policy, average = (
        load.saved_params(folder, weights.on_first_device, part=part)
        for part in ("params", "ref_ema")
    )
    assert (policy["embed"] != average["embed"]).any()
    shutil.rmtree(folder / "steps" / "4")
    run(texts, tmp_path, ("prepare", "train"), **changes)
    again = load.saved_params(folder, weights.on_first_device, part="ref_ema")
    jax.tree.map(np.testing.assert_array_equal, again, average)

    own.write_text(own.read_text().replace("1.0", "2.0"))
    del sys.modules[own.stem]
    outside.load.cache_clear()
    with pytest.raises(InputError, match="config.source of own_score_of_a_run:relative"):
        run(texts, tmp_path, **changes)


def test_a_reference_that_evolves_starts_as_the_reference_and_relevance_is_cached(texts, tmp_path):
    parts = (("excess", 1.0), ("utility", 1.0))
    changes = {
        "select__score": "combined",
        "select__parts": parts,
        "select__ref_ema_decay": 1 - 1e-9,
    }
    changes |= {"select__ref_ema_init": "reference", "select__utility": "relevance"}
    changes |= {"select__domain_ratios": (("clean", 1.0),), "mixed": True}
    run(texts, tmp_path, **changes)
    columns = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True, deletechars="")
    np.testing.assert_allclose(columns["selected_share/clean"], 1.0)
    np.testing.assert_allclose(columns["selected_share/noisy"], 0.6, atol=0.01)
    said = json.loads((tmp_path / "eval.json").read_text())["selection"]["said"]
    assert said.endswith("; of clean every token")
    assert not (tmp_path / "scores").exists()
    average = load.saved_params(tmp_path / "checkpoints", weights.on_first_device, part="ref_ema")
    reference = load.load(tmp_path / "reference")[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), average, reference)
    assert np.abs(cached_utility(tmp_path)).max() <= 1.001
    assert cached_utility(tmp_path).std() > 0.01
    with pytest.raises(InputError, match=r"config.select.utility"):
        run(texts, tmp_path, **changes | {"select__utility": "tags:number"})


def test_an_average_of_two_shapes_is_one_sentence():
    with pytest.raises(InputError, match="shapes differ"):
        models.require_reference_shape({"embed": np.zeros((3, 2))}, {"embed": np.zeros((4, 2))})


@pytest.mark.nightly  # tests/training/test_parity.py cuts rows in the step
def test_rows_cut_over_devices_go_through_all_stages_alike(texts, tmp_path):
    """With a live reference: of scores that are kept a float16 may round the other way."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rows = {"train__accumulation": 2, "reference__accumulation": 2, "score__batch_size": 4}
    rows["score__cached"] = False
    run(texts, whole, mesh__data=4, mesh__tensor=2, **rows)
    run(texts, cut, mesh__sequence=2, **rows)
    found = []
    for folder in (whole, cut):
        losses = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
        sample = np.load(folder / "samples.npz")
        found.append([losses["loss"], losses["loss_selected"], sample["loss"], sample["ref_loss"]])
    np.testing.assert_allclose(*(np.concatenate([x.ravel() for x in f]) for f in found), rtol=2e-5)
    with pytest.raises(InputError, match="data.seq_len=33 targets"):
        run(texts, cut, mesh__sequence=2, data__seq_len=33, **rows)
