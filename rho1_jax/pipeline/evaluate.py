"""Stage 5: held-out losses of every model in eval.json, benchmarks, a sample of tokens in
samples.npz."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rho1_jax import config as config_lib
from rho1_jax import files, jsonfile
from rho1_jax.analysis import records
from rho1_jax.evaluation import harness, selected
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.pipeline import models
from rho1_jax.pipeline.models import Model
from rho1_jax.pipeline.score import loss_fn, utility_fn
from rho1_jax.pipeline.workspace import Workspace, say, warn
from rho1_jax.training import hosts, sharding

SAMPLE_ROWS = 64  # held-out rows, at most, whose tokens are shown and scores are judged on


def check(ws: Workspace) -> None:
    """InputError for a benchmark that is not known, or whose files are not there."""
    harness.check(ws.config.eval.tasks, ws.config.eval.data_dir)


def run(ws: Workspace) -> None:
    """Judges the initial model, the policy and its reference, unless eval.json is about these."""
    out, samples = ws.folder / "eval.json", ws.folder / "samples.npz"
    c = ws.config
    loaders = _loaders(ws)
    # A reference that follows the policy is a part of its checkpoint.
    follows = config_lib.follows_policy(c)
    binding = {name: ws.digest(name) for name in loaders if not (follows and name == "reference")}
    binding |= {name: rows.fingerprint for name, rows in ws.heldout_rows().items()}
    asked = [*c.eval.tasks, c.eval.data_dir, c.eval.limit, c.eval.rows]
    binding["tasks"] = jsonfile.digest(asked)
    finished = out.exists() and samples.exists() and jsonfile.read(out)["binding"] == binding
    if hosts.of_first(finished):
        return say(f"{ws.label}evaluate", "finished, skipped")

    result: dict[str, Any] = {"binding": binding}
    kept: dict[str, Model] = {}
    for name, load_model in loaders.items():
        model = load_model(ws)
        result[name] = models.heldout_fn(ws, model[1])(model[0])
        parts = [f"{domain} {r['loss']:.3f}" for domain, r in result[name].items()]
        say(f"{ws.label}evaluate", f"{name:9} held-out loss {'  '.join(parts)}")
        if name != "initial":  # a third model need not fit beside the two that are compared
            kept[name] = model
    result["selection"] = _selection(ws)
    _warn_if_overtaken(ws, result)

    sample = _sample(ws, kept["policy"], kept.get("reference"))
    params, shape = kept["policy"]
    if c.eval.tasks and jax.process_count() > 1:
        params = hosts.gathered(params)

    def judge() -> None:
        if "useful" in sample:
            s = ws.selection
            result["precision"] = selected.precision_of_scores(sample, s.last_ratio, s.reads)
        # A sample is judged as one batch, whatever the scope in training.
        marks = selected.mark(sample, dataclasses.replace(ws.selection, scope="batch"))
        files.unseal(samples)
        with files.replacing(samples) as stream:
            np.savez_compressed(stream, **sample, **marks)  # type: ignore[arg-type]
        files.seal(samples)
        if c.eval.tasks:
            result["tasks"] = _benchmarks(ws, params, shape)
        jsonfile.write_sealed(out, result)

    return hosts.once(judge)


def _loaders(ws: Workspace) -> Mapping[str, Callable[[Workspace], Model]]:
    """The models there are to judge, by name."""
    found = {"initial": models.initial, "policy": models.policy}
    if config_lib.follows_policy(ws.config):
        return found | {"reference": models.average}
    return found | ({"reference": models.reference} if ws.has_reference else {})


def _selection(ws: Workspace) -> dict[str, Any]:
    """What the report and the model card say of it."""
    s, asked = ws.selection, json.loads(ws.config.select.to_json_best_effort())
    said = records.entered_the_loss(asked)
    return {"score": s.score, "ratio": s.last_ratio, "scope": s.scope, "said": said}


def _sample(ws: Workspace, policy: Model, ref: Model | None) -> dict[str, np.ndarray]:
    """Held-out rows [R, S+1] of what is trained on, with what policy and reference make of them
    [R, S]. Where scores are given, they are of rows that are trained on, and so are these."""
    given = bool(ws.given_scores)
    rows = ws.train_rows(ws.config.data.corpus) if given else ws.heldout_rows()
    names = [n for n in config_lib.mean_shares(ws.config) if n in rows][:SAMPLE_ROWS]
    numbered = [d.name for d in ws.selection.domains]
    each = min(SAMPLE_ROWS // max(len(names), 1), ws.config.eval.rows)
    there = ws.visited_rows if given else {name: np.arange(len(rows[name])) for name in rows}
    ids = {name: numbers[:each] for name, numbers in there.items()}
    known = (ws.cached_scores(ids) or {}) if given else {}
    views = {"": policy} if ref is None else {"": policy, "ref_": ref}
    score_fns = {prefix: loss_fn(ws, model, entropy=True) for prefix, model in views.items()}
    if ws.selection.needs_utility:
        score_fns["utility"] = utility_fn(ws, lambda: ref or models.reference(ws))
    return selected.sample(
        [rows[name] for name in names],
        score_fns,
        row_ids=[ids[name] for name in names],
        batch_size=ws.config.score.batch_size,
        put=ws.put_whole,
        numbers=[numbered.index(name) for name in names] if numbered else (),
        known=[known[name] for name in names] if known else (),
    )


def _warn_if_overtaken(ws: Workspace, result: Mapping[str, Any]) -> None:
    if config_lib.follows_policy(ws.config):  # it is meant to be overtaken
        return
    for domain, r in result.get("reference", {}).items():
        if domain in ws.config.data.clean and result["policy"][domain]["loss"] < r["loss"]:
            warn(
                "evaluate",
                f"the policy now knows {domain} better than its reference: "
                "excess loss had little left to say; use a stronger reference.",
            )


def _benchmarks(ws: Workspace, params: Any, shape: LlamaConfig) -> dict[str, Any]:
    """Benchmarks of a model; of several hosts the first runs them, on its own devices.

    Rows of all lengths are not cut over devices: then tensor takes the place of sequence.
    """
    batch_size, mesh = ws.config.score.batch_size, ws.mesh
    if jax.process_count() > 1 or sharding.n_row_parts(mesh) > 1:
        shape = dataclasses.replace(shape, batch_axes=sharding.BATCH_AXES)
        mine = jax.local_devices()
        mesh = sharding.make_mesh(1, math.gcd(batch_size, len(mine)), -1, devices=mine)
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = harness.evaluate(
            Scorer(params, shape, ws.tokenizer, batch_size=batch_size),
            ws.config.eval.tasks,
            out=ws.folder / "benchmarks",
            data_dir=ws.config.eval.data_dir,
            limit=ws.config.eval.limit or None,
        )
    say("evaluate", f"benchmarks of the policy\n{harness.table(found)}")
    return found["tasks"]
