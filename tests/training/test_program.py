"""What a config makes of the step."""

import dataclasses
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rho1_jax.config import default_config
from rho1_jax.errors import InputError
from rho1_jax.models import llama, presets
from rho1_jax.slm.selection import Selection
from rho1_jax.training import program, sharding
from rho1_jax.training.planning import aot
from tests import tiny_config

SHAPE = presets.get("tiny").computed()


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"select.ref_ema_decay": 0.98},
        {"score.cached": False},
        {"score.entropy": True},
        {"select.score": "utility", "select.utility": "tags:number"},
    ],
)
def test_what_is_planned_is_what_is_run(changes):
    """aot.py and the stage train lower the same program, whatever the method."""
    c = tiny_config.get_config()
    c.update_from_flattened_dict({"mesh.data": 8, "mesh.fsdp": 1} | changes)
    mesh = sharding.make_mesh(**c.mesh)
    with jax.set_mesh(mesh):
        planned = aot.build(c, mesh)
        shape = planned_shape(c, mesh, c.model.dtype)
        run = program.of_policy(c, shape, shape, mesh, steps=c.train.steps)
        texts = [
            p.step.lower(p.state, p.ref_params, p.batch, jax.random.key(0)).as_text()
            for p in (planned, run)
        ]
    assert texts[0] == texts[1]
    assert (planned.state.ref_ema is not None) == ("select.ref_ema_decay" in changes)
    assert (planned.ref_params is not None) == ("score.cached" in changes)
    cached = {"score.entropy": {"ref_loss", "ref_entropy"}, "select.score": {"utility"}}
    expected = next((v for k, v in cached.items() if k in changes), {"ref_loss"})
    live = {"score.cached", "select.ref_ema_decay"} & changes.keys()
    assert planned.batch.cached.keys() == (set() if live else expected)


def planned_shape(c, mesh, dtype):
    """As pipeline/models.py has it for a run with this mesh and vocabulary."""
    sizes = {"vocab_size": c.tokenizer.vocab_size, "max_length": c.data.seq_len}
    return program.computed(c, presets.get(c.model.preset, **sizes), dtype, mesh)


@pytest.mark.parametrize(("platform", "remat", "unrolled"), [
    ("cpu", "none", True), ("cpu", "full", False), ("tpu", "none", False),
])  # fmt: skip
def test_layers_are_unrolled_where_the_devices_are_not_where_the_process_is(
    platform, remat, unrolled
):
    c = tiny_config.get_config()
    c.model.remat = remat
    mesh = Mock(Mesh, devices=np.array([Mock(platform=platform)]), shape={"sequence": 1})
    shape = program.computed(c, presets.get("tiny"), "float32", mesh)
    assert shape.scan_layers == (not unrolled)


def test_a_live_reference_costs_a_forward_pass():
    forward = llama.flops_per_token(SHAPE, 64)
    assert program.flops_per_token(SHAPE, None, 64) == 3 * forward
    assert program.flops_per_token(SHAPE, SHAPE, 64) == 4 * forward
