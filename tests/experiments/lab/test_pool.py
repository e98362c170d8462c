"""The pool: one folder per config, nothing done twice, rows and references shared, in order."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.lab import pool
from experiments.lab.study import CLM
from rho1_jax import jsonfile


def test_a_folder_is_named_by_what_decides_the_numbers(study):
    a, same, other = (study.config(0) for _ in range(3))
    same.update(log_every=7)
    same.mesh.update(data=1)
    other.select.ratio = 0.5
    places = [pool.place(study.pool, c) for c in (a, same, other)]
    assert places[0] == places[1]
    assert places[0] != places[2]
    assert pool.config_of(places[2]).select.ratio == 0.5


def test_runs_share_rows_reference_and_scores_and_follow_their_base(study):
    slm, inverse, clm = (study.config(0, c) for c in ({}, {"select.score": "inverse"}, CLM))
    folders = study.run({"SLM": slm, "inverse": inverse, "CLM": clm})
    assert all(map(pool.finished, folders.values()))
    for name in ("data", "reference", "scores"):
        assert (folders["SLM"] / name).resolve() == (folders["inverse"] / name).resolve()
    assert (folders["SLM"] / "data").resolve() == (folders["CLM"] / "data").resolve()
    assert not (folders["CLM"] / "reference").exists()
    base = pool.place(study.pool, study.base(0))
    assert slm.model.init == str(base)
    evals = [jsonfile.read(folder / "eval.json") for folder in (base, folders["SLM"])]
    assert evals[0]["binding"]["policy"] == evals[1]["binding"]["initial"]


def test_the_losses_of_rows_add_up_to_the_held_out_loss(study):
    folder = study.run({0: study.config(0)})[0]
    for domain, found in jsonfile.read(folder / "eval.json")["policy"].items():
        nats, targets = pool.heldout_rows(folder)[domain].sum(0)
        assert targets == found["tokens"]
        np.testing.assert_allclose(nats / targets, found["loss"], rtol=1e-5)


def test_a_finished_run_is_not_done_again(study, monkeypatch):
    configs = {0: study.config(0)}
    study.run(configs)
    monkeypatch.setattr(pool.main, "run", None)  # any call would fail
    study.run(configs)
    configs[0].train.lr = 1e-5
    with pytest.raises(TypeError):
        study.run(configs)


def test_other_domains_have_a_reference_of_their_own(study):
    slm = study.config(0)
    other = ConfigDict(slm.to_dict())
    other.data.clean = ConfigDict({"again": other.data.clean["clean"].to_dict()})
    folders = [pool.place(study.pool, c) for c in (slm, other)]
    shared = [set(pool._link_shared(folder)) for folder in folders]
    assert shared[0].isdisjoint(shared[1])


@pytest.mark.slow
def test_two_processes_train_what_one_does(study, folder):
    this = dataclasses.replace(study, out=folder / "apart" / "example")
    configs = [this.config(seed, CLM) for seed in (0, 1)]
    folders = [pool.place(this.pool, c) for c in configs]
    todo = pool.unfinished(folders)
    assert [pool._depth(f) for f in todo] == [1, 1, 2, 2]
    assert sorted(pool.in_processes(todo, 2)) == sorted(todo)
    mine = study.run({seed: study.config(seed, CLM) for seed in (0, 1)})
    for seed, there in enumerate(folders):
        for domain, found in pool.heldout_rows(there).items():
            np.testing.assert_allclose(found, pool.heldout_rows(mine[seed])[domain], rtol=1e-4)
