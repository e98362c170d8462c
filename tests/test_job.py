"""What a job hands to the step."""

import dataclasses
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from rho1_jax import job
from rho1_jax.config import default_config
from rho1_jax.errors import InputError
from rho1_jax.models import presets
from rho1_jax.slm.selection import Selection

SHAPE = presets.get("tiny")


def rowwise_of(top, **changes):
    c = default_config()
    c.train.update(backward_rows_top=top, **changes)
    this = job.Job("train", Path(), Path(), c.train, ConfigDict(), Selection("excess", 0.5))
    return job._policy_apply(this, SHAPE).keywords.get("rowwise")


def test_backward_is_exact_unless_asked_for():
    assert rowwise_of(0) is None
    reference = default_config().reference
    this = job.Job("reference", Path(), Path(), reference, ConfigDict())
    assert "rowwise" not in job._policy_apply(this, SHAPE).keywords


def test_selected_rows_know_the_selection_and_the_accumulation():
    rowwise = rowwise_of(3, accumulation=2)
    assert (rowwise.top, rowwise.n_blocks, rowwise.accumulated) == (3, SHAPE.n_layers, True)
    assert rowwise.selection == Selection("excess", 0.5)
    assert rowwise.save_products
    full = dataclasses.replace(SHAPE, remat="full")
    c = default_config()
    c.train.backward_rows_top = 1
    this = job.Job("train", Path(), Path(), c.train, ConfigDict(), Selection("excess", 0.5))
    assert not job._policy_apply(this, full).keywords["rowwise"].save_products


def test_more_blocks_than_there_are_is_one_sentence():
    with pytest.raises(InputError, match="backward_rows_top is 9, but the model has 4 blocks"):
        rowwise_of(9)
