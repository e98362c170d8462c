"""A trial of those that python -m tests.chaos makes many of."""

import random

import pytest

from tests.chaos import kills
from tests.chaos.disturbances import OF_DISKS, SIGNALS


@pytest.mark.slow
def test_a_run_stopped_in_each_stage_ends_with_the_same_bits(texts, tmp_path):
    expected = kills.straight(kills.SETTINGS["plain"], texts, tmp_path / "straight")
    befalls = {
        "prepare": "kill -9", "reference": "Ctrl-C twice", "score": "kill -9", "train": "SIGTERM",
        "evaluate": "Ctrl-C",
    }  # fmt: skip
    plan = [(stage, what, SIGNALS[what]) for stage, what in befalls.items()]
    run = tmp_path / "run"
    tries, wrong = kills.trial("plain", texts, run, expected, plan, random.Random(0))
    assert not wrong
    assert len(tries) > 2
    assert all(this.survived for this in tries)

    for name in ("eval.json", "checkpoints opt_state", "scores/noisy/ref_loss.npy"):
        other = expected._replace(kept=expected.kept | {name: "other"})
        assert kills.difference(run, other) == f"not the same bits: {name}"


def test_plans_hit_all_stages_with_all_disturbances():
    rng, kinds = random.Random(0), SIGNALS | OF_DISKS
    plans = [kills.a_plan(rng, 100, kinds, list(kills.STAGES)) for _ in range(60)]
    assert {len(plan) for plan in plans} == set(range(1, kills.MOST_KILLS + 1))
    assert {stage for plan in plans for stage, _, _ in plan} == set(kills.STAGES)
    assert {what for plan in plans for _, what, _ in plan} == set(kinds)
    order = list(kills.STAGES)
    for plan in plans:
        places = [order.index(stage) for stage, _, _ in plan]
        assert places == sorted(places)


def test_a_table_counts_what_was_lost():
    tries = [kills.Try("plain", "kill -9", stage, stage != "train") for stage in ("score", "train")]
    lines = kills.table(tries).splitlines()
    assert "| stage: train | 1 | 0 |" in lines
    assert lines[-1] == "| all | 2 | 1 |"
