"""Averages from sums, and a log that survives being cut off."""

import csv
import logging
import os
import time

import jax
import pytest

from rho1_jax.errors import InputError
from rho1_jax.training import metrics
from rho1_jax.training.metrics import MetricsLog

SUMS = {
    "tokens": 10.0, "selected": 4.0, "loss": 30.0, "loss_selected": 20.0, "grad_norm": 1.5,
    "useful": 5.0, "selected_useful": 3.0, "learning_rate": 0.1, "bad": 0.0, "empty": 0.0,
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


def test_shares_by_domain_have_columns_of_their_own(tmp_path):
    sums = SUMS | {"tokens/web": 8.0, "selected/web": 2.0, "tokens/books": 0.0, "selected/books": 0}
    with open_log(tmp_path, 0, domains=("web", "books")) as log:
        log.step(1, sums)
    (row,) = rows(tmp_path)
    assert (row["selected_share/web"], row["selected_share/books"]) == ("0.25", "")


def test_clm_has_no_unselected_loss():
    assert "loss_unselected" not in metrics.averages(SUMS | {"selected": 10.0})


def open_log(folder, first_step, **more):
    return MetricsLog(
        folder, name="train", first_step=first_step, steps=10,
        flops_per_token=1.0, peak_flops=1.0, every=1, **more,
    )  # fmt: skip


def test_a_step_is_read_in_one_transfer_and_nothing_is_computed_for_it(tmp_path, monkeypatch):
    """What the host asks of the device waits behind the step that is queued already."""
    sums = jax.device_put(SUMS)
    transfers = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: transfers.append(1) or get(x))
    with open_log(tmp_path, 0) as log:
        log.step(1, sums)
        with jax.transfer_guard_host_to_device("disallow"):  # what computes with jnp sends numbers
            log.step(2, sums)
    assert transfers == [1, 1]


def test_a_step_that_kept_nothing_or_had_nothing_leaves_its_columns_empty(tmp_path):
    nothing_kept = SUMS | {"selected": 0.0, "loss_selected": 0.0, "empty": 1.0}
    nothing_there = dict.fromkeys(SUMS, 0.0) | {"empty": 1.0}
    with open_log(tmp_path, 0) as log:
        log.step(1, nothing_kept)
        log.step(2, nothing_there)
    first, second = rows(tmp_path)
    assert (first["loss"], first["loss_selected"], first["empty"]) == ("3", "", "1")
    assert (second["loss"], second["empty"], second["bad"]) == ("", "1", "0")


def rows(folder, name="metrics.csv"):
    with (folder / name).open(newline="") as f:
        return list(csv.DictReader(f))


def crashed(folder, name, half_a_line):
    with (folder / name).open("a") as f:
        f.write(half_a_line)
    (folder / f".{name}.sha256").unlink()  # written when the log is closed


@pytest.mark.parametrize(
    ("old", "new"), [("\r\n2,20,", "\r\n2,2 0,"), ("\r\n2,20,", "\r\n2,20"), ("step", "stap")]
)
def test_a_damaged_log_is_one_sentence(old, new, tmp_path):
    with open_log(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.step(step, SUMS)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode(), 1))
    with pytest.raises(InputError, match=r"metrics.csv is damaged, its checksum .* put back a co"):
        open_log(tmp_path, 3)
    (tmp_path / ".metrics.csv.sha256").unlink()
    with pytest.raises(InputError, match=r"metrics.csv is damaged \(.* go on without its lines"):
        open_log(tmp_path, 3)


def test_a_full_disk_leaves_the_old_log(tmp_path, monkeypatch):
    with open_log(tmp_path, 0) as log:
        log.step(1, SUMS)
    before = (tmp_path / "metrics.csv").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        open_log(tmp_path, 1)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert not list(tmp_path.glob("*.draft"))


def test_resume_cuts_back_and_counts_on(tmp_path, caplog):
    caplog.set_level(logging.INFO, "rho1_jax")
    heldout = {"web": {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 5}}
    with open_log(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.step(step, SUMS)
            log.heldout(step, heldout)
    crashed(tmp_path, "metrics.csv", "4,40")
    crashed(tmp_path, "heldout.csv", "2,20,web,2,1")  # the last number had more digits
    with open_log(tmp_path, 2) as log:
        log.step(3, SUMS)
    assert [(r["step"], r["tokens"]) for r in rows(tmp_path)] == [
        ("1", "10"), ("2", "20"), ("3", "30"),
    ]  # fmt: skip
    heldout = [(r["step"], r["tokens"]) for r in rows(tmp_path, "heldout.csv")]
    assert heldout == [("1", "10"), ("2", "20")]  # tokens trained on, not those evaluated
    out = caplog.text
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
