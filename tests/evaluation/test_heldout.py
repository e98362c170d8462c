"""Held-out loss and bits per byte by hand; the sample of tokens and its precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.data.loader import Rows
from rho1_jax.errors import InputError
from rho1_jax.evaluation import heldout, selected
from rho1_jax.slm.selection import Selection
from rho1_jax.slm.step import Batch


class FakeRows(Rows):
    """Three rows of four targets, the last one half padding; 10 bytes each."""

    seq_len = 4
    name = "fake/val"

    def __init__(self):
        """Nothing to open."""

    def __len__(self):
        return 3

    def __getitems__(self, indices):
        return [
            {
                "tokens": np.arange(5, dtype=np.int32) + i,
                "length": np.int32(2 if i == 2 else 4),
                "bytes": np.int32(10),
                "useful": np.arange(4) % 2 == 0,
            }
            for i in indices
        ]


def put(batch):
    return Batch(**{k: batch[k] for k in Batch._fields if k in batch})


def eval_fn(nats_per_token, batch):
    n = float(batch.valid.sum())
    return {"loss": nats_per_token * n, "tokens": n}


def test_loss_and_bits_per_byte_by_hand():
    got = heldout.heldout_losses(
        eval_fn, 2.0, {"web": FakeRows()}, max_rows=99, batch_size=2, put=put
    )
    assert got["web"]["tokens"] == 10
    assert got["web"]["loss"] == pytest.approx(2.0)
    assert got["web"]["bits_per_byte"] == pytest.approx(2.0 * 10 / math.log(2) / 30)


def test_a_domain_is_one_wait(monkeypatch):
    """What is left is numbers of the host: to read each by itself would be a wait for each."""
    waits, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: waits.append(x) or get(x))

    def on_device(nats, batch):
        return {name: jnp.float32(x) for name, x in eval_fn(nats, batch).items()}

    two = {"web": FakeRows(), "books": FakeRows()}
    heldout.heldout_losses(on_device, 2.0, two, max_rows=99, batch_size=1, put=put)
    assert [len(sums) for sums in waits] == [3, 3]


def test_only_the_first_rows_when_asked():
    got = heldout.heldout_losses(
        eval_fn, 2.0, {"web": FakeRows()}, max_rows=1, batch_size=2, put=put
    )
    assert got["web"]["tokens"] == 4


def test_a_domain_without_a_token_to_predict_is_named():
    def nothing(*_):
        return {"loss": 0.0, "tokens": 0.0}

    with pytest.raises(InputError, match="held-out rows of web have no token"):
        heldout.heldout_losses(nothing, 2.0, {"web": FakeRows()}, max_rows=9, batch_size=2, put=put)


def test_simulated_devices_run_one_evaluation_at_a_time(monkeypatch):
    """models/placement.py says why."""
    begun, ended = [], []

    def eval_fn(_, batch):
        assert len(begun) == len(ended)
        begun.append(batch)
        return {"loss": 1.0, "tokens": 1.0}

    def wait(x):
        ended.append(x)
        return x

    monkeypatch.setattr(jax, "block_until_ready", wait)
    heldout.heldout_losses(eval_fn, 2.0, {"web": FakeRows()}, max_rows=9, batch_size=1, put=put)
    assert len(begun) == len(ended) == 3


def test_sample_holds_real_rows_with_each_models_view():
    def score_fn(batch):
        return {"ref_loss": batch.tokens[:, 1:] * 1.0, "ref_entropy": batch.tokens[:, 1:] * 2.0}

    got = selected.sample(
        [FakeRows(), FakeRows()], {"": score_fn, "ref_": score_fn}, row_ids=[np.arange(3)] * 2,
        batch_size=2, put=put,
    )  # fmt: skip
    assert got["tokens"].shape == (6, 5)
    assert {"loss", "entropy", "ref_loss", "ref_entropy", "valid", "useful"} <= got.keys()
    np.testing.assert_array_equal(got["loss"], got["tokens"][:, 1:])


def test_sample_holds_what_is_known_of_its_rows():
    known = {"ref_loss": np.arange(12, dtype=np.float16).reshape(3, 4)}
    got = selected.sample(
        [FakeRows()], {"": lambda batch: {"ref_loss": batch.tokens[:, 1:]}},
        row_ids=[np.array([0, 2])], batch_size=4, put=put, known=[known],
    )  # fmt: skip
    np.testing.assert_array_equal(got["ref_loss"], [[0, 1, 2, 3], [8, 9, 10, 11]])
    np.testing.assert_array_equal(got["tokens"][:, 0], [0, 2])


def sample(**kwargs):
    valid = np.ones((1, 4), bool)
    tokens = np.zeros((1, 5), np.int32)
    return {"tokens": tokens, "loss": np.array([[4.0, 3.0, 2.0, 1.0]]), "valid": valid} | kwargs


def test_precision_by_hand():
    useful = np.array([[True, False, True, False]])
    got = selected.precision_of_scores(
        sample(useful=useful, ref_loss=np.array([[0.0, 3.0, 0.0, 5.0]])), 0.5
    )
    assert got["excess"] == {"precision": 1.0, "useful_share": 0.5}
    assert got["loss"]["precision"] == 0.5
    assert got["inverse"]["precision"] == 0.0
    assert "entropy" not in got  # no entropies were given


def test_mark_says_score_and_selection():
    got = selected.mark(sample(ref_loss=np.zeros((1, 4))), Selection("excess", 0.25))
    np.testing.assert_array_equal(got["selected"], [[True, False, False, False]])
    np.testing.assert_array_equal(got["score"], jnp.array([[4.0, 3.0, 2.0, 1.0]]))
    assert "score" not in selected.mark(sample(), Selection("all", 1.0))
