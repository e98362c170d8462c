"""Runs that go on for more steps than they were asked for at first."""

import csv
import shutil

import jax
import numpy as np
import pytest

from rho1_jax import main
from rho1_jax.errors import InputError
from rho1_jax.training.checkpoint import load_model
from rho1_jax.training.metrics import MetricsLog
from tests import tiny_config

WSD = {"train.schedule": "wsd", "train.decay_steps": 2, "train.lr": 1e-2}
TIMES = {"seconds", "tokens_per_second", "matmul_utilization", "input_wait"}


def run(texts, folder, steps, stages=("prepare", "reference", "score", "train"), **changes):
    c = tiny_config.get_config()
    base = {"data.root": str(texts), "model.preset": "nano", "reference.steps": 2,
            "train.batch_size": 16, "checkpoint.every": 4, "checkpoint.keep": 1,
            "eval.every": 100}  # fmt: skip
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    c.update_from_flattened_dict(base | WSD | {"train.steps": steps} | changes)
    main.run(c, folder, stages)


def lines(folder):
    with (folder / "metrics.csv").open() as f:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(f)]


def steps_in(folder):
    return {int(path.name) for path in (folder / "checkpoints" / "steps").glob("[0-9]*")}


@pytest.fixture
def stops_at(monkeypatch):
    """As if the process were killed when it has logged that step."""
    step = MetricsLog.step

    def stop(at):
        def logged(self, number, *args, **kwargs):
            if number == at:
                raise SystemExit("killed")
            return step(self, number, *args, **kwargs)

        monkeypatch.setattr(MetricsLog, "step", logged)

    return stop


def test_a_decayed_run_goes_on_bit_for_bit_as_if_asked_at_once(texts, tmp_path, stops_at, capsys):
    """From before its decay, killed on the way, over rows that were not scored before."""
    once, grown = tmp_path / "once", tmp_path / "grown"
    run(texts, grown, 8)
    assert steps_in(grown) == {6, 8}  # the newest, and the last before the decay
    stops_at(11)
    with pytest.raises(SystemExit):
        run(texts, grown, 14)
    said = capsys.readouterr().out
    assert "train       14 steps of 512 tokens, 7,168 in all; goes on from step 6" in said
    assert "Step 8 had decayed" in said
    assert "train: resumes at step 6" in said
    stops_at(0)
    run(texts, grown, 14)
    assert "train: resumes at step 8" in capsys.readouterr().out
    run(texts, once, 14)
    jax.tree.map(
        np.testing.assert_array_equal, *(load_model(folder)[0] for folder in (grown, once))
    )
    assert lines(grown) == lines(once)
    assert steps_in(grown) == steps_in(once) == {12, 14}
    with pytest.raises(InputError, match=r"train.steps \(14, 8\) differ"):
        run(texts, grown, 8)
    shutil.rmtree(grown / "checkpoints" / "steps" / "12")
    with pytest.raises(InputError, match="no checkpoint from before its decay, .* after step 12"):
        run(texts, grown, 20)
