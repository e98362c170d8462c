"""A restart asks strings, not weights; what only says how to compute may change between two."""

import json

import jax
import numpy as np
import pytest

from rho1_jax import main
from rho1_jax.data import loader
from rho1_jax.models.formats import digests, load
from rho1_jax.pipeline import models, score, train
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import program, sharding
from rho1_jax.training.checkpoint import Checkpoints, load_model
from rho1_jax.training.planning import around
from tests import tiny_config


def config(texts, **changes):
    c = tiny_config.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    c.update_from_flattened_dict({"data.root": str(texts), "train.steps": 4} | changes)
    return c


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    main.run(config(texts), folder)
    return folder


def test_what_is_planned_around_the_step_is_what_the_stages_run(texts, finished):
    """Of each program the same text, lowered from shapes and from the models of a run."""
    c = config(texts, score__entropy=True)
    mesh = sharding.make_mesh(**c.mesh)
    with jax.set_mesh(mesh):
        ws = Workspace(c, finished, mesh)
        planned = around.programs(c, models.planned(ws), models.planned_reference(ws), mesh)
        run = dict(lowered_by_stages(ws))
    assert planned.keys() == run.keys()
    for name, plan in planned.items():
        assert plan.lowered.as_text() == run[name].as_text(), name
        moments = 2 * around.bytes_of(models.policy(ws)[0])
    assert moments < planned["heldout"].beside < moments + 100  # the counts


def lowered_by_stages(ws):
    """(name, program) as pipeline/ makes them of what lies in the run's folder."""
    c, key = ws.config, jax.eval_shape(lambda: ws.key)
    rows = ws.train_rows(c.data.corpus)["noisy"]
    batch = ws.put(next(iter(loader.batches_of(rows, np.arange(8), batch_size=8, **ws.parts))))
    (params, shape), reference = models.policy(ws), models.reference(ws)
    yield "initial", program.initial(models.initial_shape(ws), ws.mesh).lower(key)
    built = train.of_reference(ws).program(shape, c.reference.steps)
    yield "reference", built.step.lower(built.state, None, built.batch, key)
    built = train.of_policy(ws).program(shape, c.train.steps)
    yield "start", program.start(built).lower(params, ref_ema=None)
    for name, model, entropy in (("score", reference, True), ("sample", (params, shape), True)):
        scores = score.loss_fn(ws, model, entropy=entropy)
        yield name, scores.func.lower(*scores.args, batch)
    yield "heldout", models.heldout_fn(ws, shape).args[0].lower(params, batch)
    with Checkpoints(ws.model_folder("policy"), keep=1) as checkpoints:
        largest = max(jax.tree.leaves(checkpoints.restore(built.state)), key=lambda x: x.size)
    yield "save", digests.program(largest.sharding).lower(largest)


@pytest.fixture
def weights_read(monkeypatch):
    """Names of the models whose weights are read or made while a test runs."""
    seen = []
    monkeypatch.setattr(load, "saved_params", lambda folder, *_, **__: seen.append(str(folder)))
    for name in ("initial", "policy", "reference", "average"):
        monkeypatch.setattr(models, name, lambda _ws, name=name: seen.append(name))
    return seen


def test_a_finished_run_loads_no_model(texts, finished, weights_read, capsys):
    main.run(config(texts), finished)
    assert weights_read == []
    said = capsys.readouterr().out
    for stage in ("reference: finished", "noisy is finished", "train: finished", "evaluate: fini"):
        assert stage in said


def test_a_run_goes_on_with_other_ways_to_compute(texts, tmp_path):
    """From eight devices to one row of microbatches in smaller chunks, rematerialised: the method
    is the same, and so are the numbers but for the order of sums."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    main.run(config(texts), straight, ("prepare", "reference", "score", "train"))
    main.run(config(texts), moved, ("prepare", "reference"))
    how = {
        "mesh__data": 4, "mesh__fsdp": 2, "score__batch_size": 16, "loss_chunk_tokens": 64,
        "model__remat": "full", "checkpoint__every": 1, "log_every": 2,
    }  # fmt: skip
    main.run(config(texts, **how), moved, ("score", "train"))
    ours, theirs = (load_model(folder)[0] for folder in (moved, straight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, theirs)


def test_evaluation_that_asks_for_more_is_made_again(texts, finished, capsys):
    main.run(config(texts, eval__rows=4), finished, ("evaluate",))
    assert "evaluate: policy" in capsys.readouterr().out
    evals = json.loads((finished / "eval.json").read_text())
    assert evals["policy"]["noisy"]["tokens"] <= 4 * 32


def test_a_finished_run_gets_benchmarks(texts, finished, tmp_path, capsys):
    asks = "Answer true or false, question: is {} true?\n\nAnswer format: true/false"
    items = [{"instruction": asks.format(what), "answer": "true"} for what in ("one", "two")]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    asked = {"eval__tasks": ("boolq",), "eval__data_dir": str(tmp_path)}
    main.run(config(texts, **asked), finished)
    assert "train: finished at step 4, skipped" in capsys.readouterr().out
    tasks = json.loads((finished / "eval.json").read_text())["tasks"]
    assert tasks["boolq"]["n"] == 2
    assert json.loads((finished / "benchmarks" / "results.json").read_text())["context"] == 32
    assert "boolq" in (finished / "report.html").read_text()
    main.run(config(texts, **asked), finished)
    assert "evaluate: finished, skipped" in capsys.readouterr().out


def test_the_sample_is_of_text_that_is_trained_on(texts, tmp_path):
    """A domain of weight 0 is evaluated, and neither sampled nor selected from."""
    c = config(texts)
    with c.unlocked():
        c.data.corpus.clean = c.data.clean.clean.copy_and_resolve_references()
        c.data.corpus.clean.weight = 0.0
    main.run(c, tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text())["policy"].keys() == {"noisy", "clean"}
    with np.load(tmp_path / "samples.npz") as sample:
        sampled = len(sample["tokens"])
    rows = json.loads((tmp_path / "data/noisy/manifest.json").read_text())["splits"]["val"]["rows"]
    assert sampled == min(8, rows)
