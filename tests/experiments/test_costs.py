"""What variants of the method cost, by hand, and what single tokens say of a selection."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import math as math_config
from experiments import selected_tokens
from experiments.lab import study, tokens
from experiments.lab.tokens import Tokens

RELEVANT = {"select.score": "utility", "select.utility": "relevance"}
BOTH = {"select.score": "combined", "select.parts": (("excess", 1.0), ("utility", 1.0))}


@pytest.mark.parametrize(
    ("changes", "trained_reference", "passes"),
    [
        ({}, 1, 1), (study.CLM, 0, 0), ({"select.score": "random"}, 0, 0),
        ({"select.score": "middle"}, 0, 0), ({"select.unselected_weight": 0.1}, 1, 1),
        ({"select.ref_ema_decay": 0.9}, 0, 1),
        ({"select.ref_ema_decay": 0.9, "select.ref_ema_init": "reference"}, 1, 1),
        (RELEVANT, 1, 1), (BOTH | {"select.utility": "relevance"}, 1, 2),
        (BOTH | {"select.utility": "tags:number"}, 1, 1),
        ({"select.score": "utility", "select.utility": "tags:number"}, 0, 0),
    ],
)  # fmt: skip
def test_flops_by_hand(changes, trained_reference, passes):
    c = ConfigDict(math_config.get_config().to_dict())
    c.update_from_flattened_dict(changes)
    c.train.update(steps=300, batch_size=8)
    c.reference.update(steps=200, batch_size=4)
    assert study.flops(c) == pytest.approx(2400 + 800 * trained_reference + 800 * passes)


def test_selections_go_by_excess_loss_and_overlap_counts_what_they_share():
    losses = np.array([[4.0, 3, 2, 1], [1, 3, 4, 3]], np.float32)
    ref_loss = np.array([0.0, 2, 0, 1], np.float32)
    seen = Tokens(np.arange(2), losses, ref_loss, None, np.zeros(4), np.zeros(4), [""] * 4)
    kept = tokens.selections(seen, 0.5)
    np.testing.assert_array_equal(kept, [[1, 0, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(selected_tokens._overlap(kept), [[1, 0.5], [0.5, 1]])


def test_watched_runs_keep_their_checkpoints():
    assert tokens.watched(100) == {"checkpoint.every": 10, "checkpoint.keep": 20}
    assert tokens.watched(2)["checkpoint.every"] == 1
