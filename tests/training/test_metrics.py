"""Averages from sums, and a log that survives being cut off."""

import csv
import time

import pytest

from rho1_jax.training import metrics
from rho1_jax.training.metrics import MetricsLog

SUMS = {
    "tokens": 10.0, "selected": 4.0, "loss": 30.0, "loss_selected": 20.0, "grad_norm": 1.5,
    "useful": 5.0, "selected_useful": 3.0,
}  # fmt: skip


def test_averages_by_hand():
    got = metrics.averages(SUMS)
    assert got["loss"] == 3.0
    assert got["loss_selected"] == 5.0
    assert got["loss_unselected"] == pytest.approx(10 / 6)
    assert got["selected_share"] == 0.4
    assert got["precision"] == 0.75
    assert got["useful_share"] == 0.5
    assert "ref_loss" not in got


def test_clm_has_no_unselected_loss():
    assert "loss_unselected" not in metrics.averages(SUMS | {"selected": 10.0})


def open_log(folder, first_step):
    return MetricsLog(
        folder, name="train", first_step=first_step, steps=10, learning_rate=lambda _: 0.1,
        flops_per_token=1.0, peak_flops=1.0, every=1,
    )  # fmt: skip


def rows(folder, name="metrics.csv"):
    with (folder / name).open(newline="") as f:
        return list(csv.DictReader(f))


def test_resume_cuts_back_and_counts_on(tmp_path, capsys):
    heldout = {"web": {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 5}}
    with open_log(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.step(step, SUMS)
            log.heldout(step, heldout)
    with (tmp_path / "metrics.csv").open("a") as f:
        f.write("4,40")  # a line that a crash cut short
    with open_log(tmp_path, 2) as log:
        log.step(3, SUMS)
    assert [(r["step"], r["tokens"]) for r in rows(tmp_path)] == [
        ("1", "10"), ("2", "20"), ("3", "30"),
    ]  # fmt: skip
    heldout = [(r["step"], r["tokens"]) for r in rows(tmp_path, "heldout.csv")]
    assert heldout == [("1", "10"), ("2", "20")]  # tokens trained on, not those evaluated
    out = capsys.readouterr().out
    assert "train 3/10  loss 3.000  selected 5.000  unselected 1.667  precision 75%" in out
    assert "tok/s" in out
    assert "ETA" in out


def test_waiting_for_the_input_is_noticed(tmp_path):
    def slow():
        for i in (1, 2):
            time.sleep(0.05)
            yield i

    with open_log(tmp_path, 0) as log:
        for step in log.timed(slow()):
            log.step(step, SUMS)
    waited = [float(r["input_wait"]) for r in rows(tmp_path)]
    assert len(waited) == 2
    assert all(0.3 < share <= 1.0 for share in waited)


@pytest.mark.parametrize(("seconds", "text"), [(5.0, "5s"), (65.0, "1m05s"), (3720.0, "1h02m")])
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text
