"""The stages of a run, in order: prepare, reference, score, train, evaluate, report.

Each leaves its output in the run's folder, starts from what earlier stages left there, and returns
at once if its own output is finished. So the same command always resumes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax import jsonfile, signals
from rho1_jax.analysis import report as report_page
from rho1_jax.data import builder, loader, ref_scores
from rho1_jax.errors import InputError
from rho1_jax.evaluation import harness, selected
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.job import Job, say
from rho1_jax.job import train as train_job
from rho1_jax.models import tokenizer
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.run import Run
from rho1_jax.training import checkpoint, hosts, scoring, sharding

PASSAGES = 4  # held-out rows shown in full


def prepare(run: Run) -> None:
    """Text to packed rows, per domain, in data/; several hosts take the domains in turn."""
    c = run.config.data
    hosts.once(lambda: run.tokenizer)
    with hosts.together():
        for name, source in hosts.in_turn(run.sources().items()):
            builder.prepare(
                name,
                source,
                root=c.root,
                tokenizer=run.tokenizer,
                seq_len=c.seq_len,
                out=run.folder / "data",
                beam_runner=run.beam_runner,
            )
    if not run.heldout_rows().keys() & run.config.data.corpus.keys():
        raise InputError(
            "No document of data.corpus is held out for evaluation (1 % are, by a hash of their "
            "text): add text, or name a split_field that says train or val."
        )


def reference(run: Run) -> None:
    """The reference in reference/: the initial model trained on the clean corpus, or one loaded."""
    c, folder = run.config, run.folder / "reference"
    if not config_lib.needs_reference(c):
        return say("reference", f"select.score={c.select.score} reads none, skipped")
    if c.reference.init:
        *_, tok = checkpoint.load_model(c.reference.init, run.mesh)
        tokenizer.require_same(run.tokenizer, tok)
        hosts.once(lambda: checkpoint.write_model_link(folder, c.reference.init))
        say("reference", f"is {c.reference.init}")
    elif not train_job(run, Job("reference", folder, folder, c.reference, c.data.clean)):
        return None
    return _warn_of_weak_reference(run)


def score(run: Run) -> None:
    """The reference's loss (and entropy) of every row that training will read, in scores/; their
    utility, where the selection reads one, in utility/."""
    c, params = run.config, None
    if config_lib.needs_reference(c):
        params, shape = run.reference()
    if run.selection.needs_utility:
        _score_rows(run, "utility", ("utility",), signals.utility_fn(run), params)
    if not run.selection.needs_reference:
        return say("score", f"select.score={c.select.score} reads no reference, skipped")
    if not run.caches_scores:
        return say("score", "the reference runs in every training step, nothing to keep")
    score_fn = signals.loss_fn(run, (params, shape), entropy="ref_entropy" in run.score_fields)
    return _score_rows(run, "scores", run.score_fields, score_fn, params)


def _score_rows(
    run: Run,
    folder: str,
    fields: Sequence[str],
    score_fn: signals.ScoreFn,
    params: Any,
) -> None:
    """Every row that training will read through `score_fn`, into `folder`/DOMAIN."""
    all_rows = run.train_rows(run.config.data.corpus)
    for name, row_ids in run.visited_rows().items():
        rows = all_rows[name]
        create = functools.partial(
            ref_scores.create,
            run.folder / folder / name,
            n_rows=len(rows),
            seq_len=rows.seq_len,
            fields=fields,
            binding=run.score_binding(params, rows, folder),
        )
        writer = hosts.once(create)
        missing = np.isin(row_ids, writer.missing(row_ids) if writer else [])
        todo = row_ids[hosts.of_first(missing)]
        if not todo.size:
            say("score", f"{name} is finished, skipped")
            continue
        scoring.score_rows(
            score_fn,
            loader.batches_of(rows, todo, batch_size=run.config.score.batch_size, **run.parts),
            writer,
            put=run.put,
            n_rows=todo.size,
            label=f"score {name}",
            stop=run.stop,
        )


def train(run: Run) -> None:
    """The policy in checkpoints/, with metrics.csv and heldout.csv."""
    c = run.config
    job = Job(
        "train", run.folder / "checkpoints", run.folder, c.train, c.data.corpus, run.selection,
        decay=c.select.decay,
    )  # fmt: skip
    run.train_rows(c.data.corpus)  # what is missing first is named first
    params = None
    if config_lib.needs_reference(c):
        params, shape = run.reference()
        lives = run.selection.needs_reference and not run.caches_scores
        job = dataclasses.replace(
            job,
            live_reference=(params, shape) if lives else None,
            binding={"reference": checkpoint.fingerprint(params)},
        )
    cached = run.cached_scores(params)
    del params
    train_job(run, dataclasses.replace(job, cached=cached))


def evaluate(run: Run) -> None:
    """Held-out losses of every model in eval.json; a sample of tokens in samples.npz."""
    out, samples = run.folder / "eval.json", run.folder / "samples.npz"
    c = run.config
    models = {"initial": run.initial_model(), "policy": run.policy()}
    if config_lib.follows_policy(c):
        models["reference"] = run.average()
    elif config_lib.needs_reference(c):
        models["reference"] = run.reference()
    binding = {name: checkpoint.fingerprint(params) for name, (params, _) in models.items()}
    binding |= {name: rows.fingerprint for name, rows in run.heldout_rows().items()}
    binding["tasks"] = config_lib.digest([*c.eval.tasks, c.eval.data_dir, c.eval.limit])
    finished = out.exists() and samples.exists() and jsonfile.read(out)["binding"] == binding
    if hosts.of_first(finished):
        return say("evaluate", "finished, skipped")

    result: dict[str, Any] = {"binding": binding}
    for name, (params, shape) in models.items():
        result[name] = run.heldout_fn(shape)(params)
        parts = [f"{domain} {r['loss']:.3f}" for domain, r in result[name].items()]
        say("evaluate", f"{name:9} held-out loss {'  '.join(parts)}")
    s = run.selection
    result["selection"] = {"score": s.score, "ratio": s.last_ratio, "scope": s.scope}
    _warn_of_overtaken_reference(result, c)

    sample = signals.sample(run, models["policy"], models.get("reference"))
    params, shape = models["policy"]
    if c.eval.tasks and jax.process_count() > 1:
        params = hosts.gathered(params)

    def judge() -> None:
        if "useful" in sample:
            result["precision"] = selected.precision_of_scores(sample, s.last_ratio)
        # A sample is judged as one batch, whatever the scope in training.
        marks = selected.mark(sample, dataclasses.replace(run.selection, scope="batch"))
        np.savez_compressed(samples, **sample, **marks)  # type: ignore[arg-type]
        if c.eval.tasks:
            result["tasks"] = _benchmarks(run, params, shape)
        jsonfile.write(out, result)

    return hosts.once(judge)


def report(run: Run) -> None:
    """report.html, made anew from what the run's folder holds."""
    hosts.once(lambda: _write_report(run))


STAGES: dict[str, Callable[[Run], None]] = {
    stage.__name__: stage for stage in (prepare, reference, score, train, evaluate, report)
}


def _write_report(run: Run) -> None:
    if not (run.folder / "samples.npz").exists():
        raise InputError(f"{run.folder} holds no evaluation yet: run --stages=evaluate first.")
    with np.load(run.folder / "samples.npz") as f:
        sample = dict(f)
    n = len(sample["tokens"])
    shown = np.linspace(0, n - 1, min(PASSAGES, n)).round().astype(int)
    path = report_page.write(
        run.folder,
        passages=[_passage(run, sample, row) for row in shown.tolist()],
        histogram=_histogram(sample),
    )
    say("report", str(path))


def _warn_of_weak_reference(run: Run) -> None:
    """A reference that knows the clean text no better than the policy ranks tokens by accident."""
    c = run.config
    models = {"reference": run.reference(), "initial": run.initial_model()}
    losses = {name: run.heldout_fn(shape)(params) for name, (params, shape) in models.items()}
    for domain in c.data.clean or c.data.corpus:
        if domain not in losses["reference"]:  # nothing was held out
            continue
        theirs, ours = (losses[name][domain]["loss"] for name in models)
        if not theirs < ours:  # nor where one of them is NaN
            say(
                "reference",
                f"WARNING: its held-out loss on {domain} is {theirs:.3f}, the policy starts with "
                f"{ours:.3f}: excess loss will mislead; train it longer or on better text.",
            )


def _warn_of_overtaken_reference(result: Mapping[str, Any], c: ConfigDict) -> None:
    if config_lib.follows_policy(c):  # it is meant to be overtaken
        return
    for domain, r in result.get("reference", {}).items():
        if domain in c.data.clean and result["policy"][domain]["loss"] < r["loss"]:
            say(
                "evaluate",
                f"WARNING: the policy now knows {domain} better than its reference: "
                "excess loss had little left to say; use a stronger reference.",
            )


def _benchmarks(run: Run, params: Any, shape: LlamaConfig) -> dict[str, Any]:
    """Benchmarks of a model; of several hosts the first runs them, on its own devices.

    Rows of all lengths are not cut over devices: then tensor takes the place of sequence.
    """
    batch_size, mesh = run.config.score.batch_size, run.mesh
    if jax.process_count() > 1 or sharding.n_row_parts(mesh) > 1:
        shape = dataclasses.replace(shape, batch_axes=sharding.BATCH_AXES)
        mine = jax.local_devices()
        mesh = sharding.make_mesh(1, math.gcd(batch_size, len(mine)), -1, devices=mine)
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = harness.evaluate(
            Scorer(params, shape, run.tokenizer, batch_size=batch_size),
            run.config.eval.tasks,
            out=run.folder / "benchmarks",
            data_dir=run.config.eval.data_dir,
            limit=run.config.eval.limit or None,
        )
    say("evaluate", f"benchmarks of the policy\n{harness.table(found)}")
    return found["tasks"]


def _histogram(sample: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    if "score" not in sample:
        return None
    valid = sample["valid"]
    return {
        "scores": sample["score"][valid],
        "threshold": float(sample["score"][sample["selected"]].min()),
        "useful": sample["useful"][valid] if "useful" in sample else None,
    }


def _passage(run: Run, sample: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    """One sampled row as the report shows it: its targets, as text."""
    valid = sample["valid"][row]
    columns = {
        name: sample[name][row][valid] if name in sample else None
        for name in ("loss", "ref_loss", "score", "selected")
    }
    ids = sample["tokens"][row, 1:][valid]
    return {"title": f"Held-out row {row}", "pieces": run.tokenizer.pieces(ids), **columns}
