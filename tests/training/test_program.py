"""What a config makes of the step."""

import dataclasses

import pytest

from rho1_jax.config import default_config
from rho1_jax.errors import InputError
from rho1_jax.models import llama, presets
from rho1_jax.slm.selection import Selection
from rho1_jax.training import program

SHAPE = presets.get("tiny")


def rowwise_of(top, shape=SHAPE, **changes):
    section = default_config().train
    section.update(backward_rows_top=top, **changes)
    return program._policy_apply(section, shape, Selection("excess", 0.5)).keywords.get("rowwise")


def test_backward_is_exact_unless_asked_for():
    assert rowwise_of(0) is None
    apply = program._policy_apply(default_config().reference, SHAPE, Selection("all", 1.0))
    assert "rowwise" not in apply.keywords


def test_selected_rows_know_the_selection_and_the_accumulation():
    rowwise = rowwise_of(3, accumulation=2)
    assert (rowwise.top, rowwise.n_blocks, rowwise.accumulated) == (3, SHAPE.n_layers, True)
    assert rowwise.selection == Selection("excess", 0.5)
    assert rowwise.save_products
    assert not rowwise_of(1, dataclasses.replace(SHAPE, remat="full")).save_products


def test_more_blocks_than_there_are_is_one_sentence():
    with pytest.raises(InputError, match="backward_rows_top is 9, but the model has 4 blocks"):
        rowwise_of(9)


def test_a_live_reference_costs_a_forward_pass():
    forward = llama.flops_per_token(SHAPE, 64)
    assert program.flops_per_token(SHAPE, None, 64) == 3 * forward
    assert program.flops_per_token(SHAPE, SHAPE, 64) == 4 * forward
