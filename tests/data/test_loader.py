"""Batches are a function of (seed, step), whatever the hosts and wherever a run resumes."""

import itertools

import numpy as np
import pytest

from rho1_jax.data import loader, mixture
from rho1_jax.data.loader import Rows, ordered_batches, train_batches
from rho1_jax.errors import InputError

S = 4


class Stored(list):
    def __getitems__(self, keys):
        return [self[key] for key in keys]


def make_rows(n, first=0, useful=False, name="web", seq_len=S):
    """Row i is full of the token first + i; the last one is half padding."""
    stored = Stored()
    for i in range(n):
        tokens = np.full(seq_len + 1, first + i, np.uint16)
        row = {"tokens": tokens, "length": seq_len - 2 * (i == n - 1), "bytes": 10 + i}
        stored.append(row | ({"useful": np.arange(seq_len) == i % seq_len} if useful else {}))
    manifest = {"splits": {"train": {"rows": n}}, "binding": {"seq_len": seq_len}}
    return Rows(stored, name=f"{name}/train", manifest=manifest, split="train")


def run(rows, weights=None, **changes):
    settings = {"batch_size": 6, "seed": 3, "start_step": 0, "num_steps": 8} | changes
    return list(train_batches(rows, weights or dict.fromkeys(rows, 1.0), **settings))


def ids(batches):
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def test_a_batch_holds_rows_and_what_is_known_of_them():
    rows = {"web": make_rows(9, useful=True)}
    scores = {"web": {"ref_loss": np.arange(9 * S, dtype=np.float16).reshape(9, S) / 8}}
    batches = run(rows, scores=scores)
    assert len(batches) == 8
    for batch in batches:
        index = batch["tokens"][:, 0]
        assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
            "tokens": ("int32", (6, S + 1)),
            "valid": ("bool", (6, S)),
            "useful": ("bool", (6, S)),
            "ref_loss": ("float32", (6, S)),
        }
        assert (batch["tokens"] == index[:, None]).all()
        assert (batch["valid"].sum(axis=1) == np.where(index == 8, S - 2, S)).all()
        assert batch["valid"][:, : S - 2].all()
        assert (batch["useful"].argmax(axis=1) == index % S).all()
        assert (batch["ref_loss"] == scores["web"]["ref_loss"][index]).all()


def test_several_numbers_a_token_come_as_they_are_stored():
    ids = np.arange(9 * S * 2).reshape(9, S, 2).astype("<i4")
    stored = {"web": {"ref_top_ids": ids, "ref_top": (ids / 8).astype(np.float16)}}
    for batch in run({"web": make_rows(9)}, scores=stored):
        index = batch["tokens"][:, 0]
        assert (batch["ref_top"].dtype, batch["ref_top_ids"].dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(batch["ref_top_ids"], ids[index])
        np.testing.assert_array_equal(batch["ref_top"], np.float16(ids[index] / 8))


def test_rows_say_which_domain_they_are_of():
    rows = {"web": make_rows(9), "unused": make_rows(3), "books": make_rows(9, first=100)}
    weights = {"web": 2.0, "unused": 0.0, "books": 1.0}
    for batch in run(rows, weights, numbered=["books", "web"]):
        assert (batch["domain"].dtype, batch["domain"].shape) == (np.int32, (6,))
        np.testing.assert_array_equal(batch["domain"] == 0, batch["tokens"][:, 0] >= 100)
    assert "domain" not in run(rows, weights)[0]


def test_truth_of_one_domain_only_is_left_out():
    rows = {"known": make_rows(9, useful=True), "unknown": make_rows(9)}
    assert "useful" not in run(rows)[0]
    assert "useful" in run(rows, {"known": 1.0, "unknown": 0.0})[0]


def test_epochs_are_complete_and_shuffled_anew():
    order = list(itertools.chain(*ids(run({"web": make_rows(12)}, num_steps=6))))
    epochs = [order[:12], order[12:24], order[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, range(12))}) == 4


def test_seed_and_domain_decide_the_order():
    a, b = (ids(run({"web": make_rows(40)}, seed=seed)) for seed in (3, 4))
    assert a == ids(run({"web": make_rows(40)}))
    assert a != b
    flat = [list(itertools.chain(*batches)) for batches in (a, b)]
    assert flat[0][40:] != flat[1][: len(flat[0]) - 40]  # nor one epoch late
    assert a != ids(run({"books": make_rows(40)}))


def test_hosts_take_contiguous_parts_of_the_same_batch():
    rows = {"web": make_rows(13), "books": make_rows(7, first=100)}
    weights = {"web": 2.0, "books": 1.0}
    whole = run(rows, weights)
    for n_hosts in (2, 3, 6):
        parts = [run(rows, weights, parts=(h,), n_parts=n_hosts) for h in range(n_hosts)]
        for step, batch in enumerate(whole):
            together = np.concatenate([part[step]["tokens"] for part in parts])
            np.testing.assert_array_equal(together, batch["tokens"])


def test_a_host_may_have_parts_that_are_no_neighbours():
    rows = {"web": make_rows(13)}
    whole, mine = run(rows), run(rows, parts=(0, 2), n_parts=3)
    for batch, part in zip(whole, mine, strict=True):
        np.testing.assert_array_equal(part["tokens"], batch["tokens"][[0, 1, 4, 5]])
    wanted = np.array([9, 0, 4, 10, 3, 1, 7])
    batches = list(loader.batches_of(make_rows(11), wanted, batch_size=6, parts=(0, 2), n_parts=3))
    assert [b["tokens"][:, 0].tolist() for b in batches] == [[9, 0, 3, 1], [7, 0, 0, 0]]
    assert [b["row"].tolist() for b in batches] == [[9, 0, 4, 10, 3, 1], [7] + [-1] * 5]
    (none_real,) = loader.batches_of(make_rows(11), wanted[:2], batch_size=6, parts=(1,), n_parts=3)
    assert not none_real["valid"].any()


@pytest.mark.parametrize("start", [1, 5, 7, 8])
def test_a_resumed_run_sees_the_batches_of_the_straight_run(start):
    rows = {"web": make_rows(13), "books": make_rows(7, first=100)}
    for hosts in ({}, {"parts": (1,), "n_parts": 2}):
        straight = run(rows, **hosts)
        np.testing.assert_equal(run(rows, start_step=start, **hosts), straight[start:])
    assert len(run(rows, num_steps=20)) == 20
    np.testing.assert_equal(run(rows, num_steps=20)[:8], run(rows))  # the end does not matter


@pytest.mark.parametrize("weights", [(6, 3, 1), (0.5, 0.3, 0.2), (1, 1, 0)])
def test_mixture_has_the_shares_of_the_weights(weights):
    rows = {name: make_rows(50, first=100 * i) for i, name in enumerate(("web", "code", "math"))}
    mixture = dict(zip(rows, map(float, weights), strict=True))
    order = np.concatenate(ids(run(rows, mixture, batch_size=10, num_steps=300)))
    shares = np.bincount(order // 100, minlength=3) / len(order)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=0.005)
    for domain in np.flatnonzero(weights):  # each domain goes through its own epochs
        mine = order[order // 100 == domain]
        assert sorted(mine[:50] % 100) == list(range(50))


def test_a_mixture_in_stages_goes_on_in_each_domain_where_it_was(monkeypatch):
    """Twice other weights: a domain leaves, one comes, and no row comes again before its epoch."""
    monkeypatch.setattr(mixture, "_SAMPLE", 1)  # what is compared here is not mended there
    rows = {name: make_rows(40, first=100 * i) for i, name in enumerate(("web", "code", "math"))}
    weights = {"web": 3.0, "code": 1.0, "math": 0.0}
    later = [(6, {"web": 1.0, "code": 0.0, "math": 1.0}), (9, {"math": 1.0})]
    batches = run(rows, weights, num_steps=14, later=later)
    np.testing.assert_equal(batches[:6], run(rows, weights, num_steps=6))
    order = np.array(ids(batches)) // 100
    for steps, counts in (
        (slice(6), [27, 9, 0]),
        (slice(6, 9), [9, 0, 9]),
        (slice(9, 14), [0, 0, 30]),
    ):
        assert np.bincount(order[steps].ravel(), minlength=3).tolist() == counts
    every = np.concatenate(ids(batches))
    assert len(set(every)) == len(every)
    np.testing.assert_equal(
        run(rows, weights, start_step=7, num_steps=14, later=later), batches[7:]
    )
    for steps in (3, 8, 14):
        seen = loader.visited_rows(
            rows, weights, batch_size=6, seed=3, num_steps=steps, later=later
        )
        read = {name: [r - 100 * i for r in every[: 6 * steps] if r // 100 == i]
                for i, name in enumerate(rows)}  # fmt: skip
        assert {name: found.tolist() for name, found in seen.items()} == {
            name: sorted(found) for name, found in read.items()
        }
    of_step = loader.rows_of_step(rows, weights, batch_size=6, seed=3, step=10, later=later)
    assert of_step == {"math": [r - 200 for r in ids(batches)[10]]}


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, None), (3, 9), (4, 4)])
def test_ordered_batches_hold_every_row_once(start, stop):
    batches = list(
        ordered_batches(make_rows(11, useful=True), batch_size=4, start_row=start, stop_row=stop)
    )
    row = np.concatenate([b["row"] for b in batches]) if batches else np.array([], int)
    real = row >= 0
    assert row[real].tolist() == list(range(start, 11 if stop is None else stop))
    assert not real[real.sum() :].any()  # the filling comes last
    assert len(row) % 4 == 0
    assert (~real).sum() < 4
    for batch in batches:
        filling = batch["row"] < 0
        assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(batch, 4)
        assert not batch["valid"][filling].any()
        assert not batch["bytes"][filling].any()
        assert (batch["bytes"][~filling] == 10 + batch["row"][~filling]).all()
        assert (batch["tokens"][~filling, 0] == batch["row"][~filling]).all()
        assert (
            batch["valid"][~filling].sum(axis=1) == S - 2 * (batch["row"][~filling] == 10)
        ).all()
        assert set(batch) == {"tokens", "valid", "useful", "row", "bytes"}


def test_batches_of_holds_the_rows_asked_for():
    wanted = np.array([9, 0, 4, 10, 3])
    batches = list(loader.batches_of(make_rows(11), wanted, batch_size=3))
    assert [b["row"].tolist() for b in batches] == [[9, 0, 4], [10, 3, -1]]
    assert [b["tokens"][:, 0].tolist() for b in batches] == [[9, 0, 4], [10, 3, 0]]
    assert not batches[1]["valid"][2].any()


@pytest.mark.parametrize("num_steps", [0, 1, 3, 40])
def test_visited_rows_are_those_that_training_reads(num_steps, monkeypatch):
    monkeypatch.setattr(mixture, "_BLOCK", 7)
    rows = {"web": make_rows(50), "books": make_rows(9, first=100), "off": make_rows(3)}
    weights = {"web": 3.0, "books": 1.0, "off": 0.0}
    read = set(itertools.chain(*ids(run(rows, weights, num_steps=num_steps))))
    visited = loader.visited_rows(rows, weights, batch_size=6, seed=3, num_steps=num_steps)
    assert visited["web"].tolist() == sorted(token for token in read if token < 100)
    assert visited["books"].tolist() == sorted(token - 100 for token in read if token >= 100)
    assert not visited["off"].size


def scores_of(n, field="ref_loss"):
    return {field: np.zeros((n, S), np.float16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7, "n_parts": 2}, "A batch of 7 rows cannot be cut into 2 parts"),
        ({"parts": (2,), "n_parts": 2}, r"a host has \[2\]"),
        ({"batch_size": 0}, "A batch of 0 rows"),
        ({"start_step": 9}, "start_step 9 must lie between 0 and 8"),
        ({"weights": {}}, "must be positive, and for the domains"),
        ({"weights": {"web": -1.0}}, "must be positive"),
        ({"weights": {"absent": 1.0}}, "for the domains .'empty', 'long', 'math', 'web'."),
        ({"weights": {"empty": 1.0}}, "empty/train has no rows"),
        ({"later": [(2, {"empty": 1.0})]}, "empty/train has no rows"),
        ({"later": [(2, {"web": 0.0})]}, "must be positive"),
        ({"weights": {"web": 1.0, "long": 1.0}}, "rows of different lengths .4, 9."),
        ({"scores": {"web": scores_of(5)}}, "Not every domain .* same cached scores"),
        (
            {"scores": {"web": scores_of(5), "math": scores_of(4)}},
            "ref_loss of 'math' has the shape .4, 4., not that of its rows, .5, 4.",
        ),
        (
            {"scores": {"web": scores_of(5), "math": scores_of(5, "ref_entropy")}},
            "Not every domain .* same cached scores",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_batch(changes, message):
    rows = {
        "web": make_rows(5),
        "math": make_rows(5),
        "long": make_rows(5, seq_len=9),
        "empty": make_rows(0, name="empty"),
    }
    settings = {"weights": {"web": 1.0, "math": 1.0}, "batch_size": 6, "seed": 0}
    settings |= {"start_step": 0, "num_steps": 8} | changes
    with pytest.raises(InputError, match=message):
        train_batches(rows, **settings)


@pytest.mark.parametrize(
    ("n", "changes", "message"),
    [
        (0, {}, "web/train has no rows"),
        (5, {"start_row": 6}, "Rows 6 to 5 in batches of 2 do not fit the 5 rows of web/train"),
        (5, {"stop_row": 6}, "Rows 0 to 6"),
        (5, {"batch_size": 0}, "in batches of 0"),
    ],
)
def test_ordered_batches_refuse(n, changes, message):
    with pytest.raises(InputError, match=message):
        ordered_batches(make_rows(n), **({"batch_size": 2} | changes))


def test_open_rows_refuses(tmp_path):
    with pytest.raises(InputError, match="no rows of 'web' under"):
        loader.open_rows(tmp_path, "web", "train")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text(
        '{"splits": {"train": {"rows": 0}}, "binding": {"seq_len": 4}}'
    )
    with pytest.raises(InputError, match="has no split 'dev'"):
        loader.open_rows(tmp_path, "web", "dev")
    assert len(loader.open_rows(tmp_path, "web", "train")) == 0
