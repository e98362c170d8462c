"""The stages of a run, in order: prepare, reference, score, train, evaluate, report.

Each leaves its output in the run's folder, starts from what earlier stages left there, and returns
at once if its own output is finished. So the same command always resumes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax import jsonfile
from rho1_jax.analysis import report as report_page
from rho1_jax.data import builder, loader, ref_scores
from rho1_jax.errors import InputError
from rho1_jax.evaluation import harness, selected
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.job import Job, say
from rho1_jax.job import train as train_job
from rho1_jax.models import tokenizer
from rho1_jax.run import Model, Run
from rho1_jax.training import checkpoint, scoring
from rho1_jax.training.program import apply_fn

SAMPLE_ROWS = 64  # held-out rows, at most, whose tokens are shown and scores are judged on
PASSAGES = 4  # of them, shown in full


def prepare(run: Run) -> None:
    """Text to packed rows, per domain, in data/."""
    c = run.config.data
    for name, source in run.sources().items():
        builder.prepare(
            name,
            source,
            root=c.root,
            tokenizer=run.tokenizer,
            seq_len=c.seq_len,
            out=run.folder / "data",
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
        *_, tok = checkpoint.load_model(c.reference.init)
        tokenizer.require_same(run.tokenizer, tok)
        checkpoint.write_model_link(folder, c.reference.init)
        say("reference", f"is {c.reference.init}")
    elif not train_job(run, Job("reference", folder, folder, c.reference, c.data.clean)):
        return None
    return _warn_of_weak_reference(run)


def score(run: Run) -> None:
    """The reference's loss (and entropy) of every row that training will read, in scores/."""
    c = run.config
    if not config_lib.needs_reference(c):
        return say("score", f"select.score={c.select.score} reads no reference, skipped")
    if not c.score.cached:
        return say("score", "score.cached=False, the reference runs in every training step")

    params, shape = run.reference()
    score_fn = jax.jit(
        functools.partial(
            scoring.score_step,
            apply=apply_fn(shape),
            chunk_tokens=c.loss_chunk_tokens,
            entropy="ref_entropy" in run.score_fields,
        )
    )
    all_rows = run.train_rows(c.data.corpus)
    for name, row_ids in run.visited_rows().items():
        rows = all_rows[name]
        writer = ref_scores.create(
            run.folder / "scores" / name,
            n_rows=len(rows),
            seq_len=rows.seq_len,
            fields=run.score_fields,
            binding=run.score_binding(params, rows),
        )
        todo = writer.missing(row_ids)
        if not todo.size:
            say("score", f"{name} is finished, skipped")
            continue
        scoring.score_rows(
            functools.partial(score_fn, params),
            loader.batches_of(rows, todo, batch_size=c.score.batch_size),
            writer,
            put=run.put,
            n_rows=todo.size,
            label=f"score {name}",
            stop=run.stop,
        )
    return None


def train(run: Run) -> None:
    """The policy in checkpoints/, with metrics.csv and heldout.csv."""
    c = run.config
    job = Job("train", run.folder / "checkpoints", run.folder, c.train, c.data.corpus)
    if not config_lib.needs_reference(c):
        train_job(run, dataclasses.replace(job, selection=run.selection))
        return
    run.train_rows(c.data.corpus)  # what is missing first is named first
    params, shape = run.reference()
    binding = {"reference": checkpoint.fingerprint(params)}
    cached = run.cached_scores(params) if c.score.cached else None
    live = None if c.score.cached else (params, shape)
    del params
    train_job(
        run,
        dataclasses.replace(
            job, selection=run.selection, live_reference=live, cached=cached, binding=binding
        ),
    )


def evaluate(run: Run) -> None:
    """Held-out losses of every model in eval.json; a sample of tokens in samples.npz."""
    out, samples = run.folder / "eval.json", run.folder / "samples.npz"
    c = run.config
    models = {"initial": run.initial_model(), "policy": run.policy()}
    if config_lib.needs_reference(c):
        models["reference"] = run.reference()
    binding = {name: checkpoint.fingerprint(params) for name, (params, _) in models.items()}
    binding |= {name: rows.fingerprint for name, rows in run.heldout_rows().items()}
    binding["tasks"] = config_lib.digest([*c.eval.tasks, c.eval.data_dir, c.eval.limit])
    if out.exists() and samples.exists() and jsonfile.read(out)["binding"] == binding:
        return say("evaluate", "finished, skipped")

    result: dict[str, Any] = {"binding": binding}
    for name, (params, shape) in models.items():
        result[name] = run.heldout_fn(shape)(params)
        parts = [f"{domain} {r['loss']:.3f}" for domain, r in result[name].items()]
        say("evaluate", f"{name:9} held-out loss {'  '.join(parts)}")
    s = c.select
    result["selection"] = {"score": s.score, "ratio": s.ratio, "scope": s.scope}
    _warn_of_overtaken_reference(result, c)

    sample = _sample(run, models["policy"], models.get("reference"))
    if "useful" in sample:
        result["precision"] = selected.precision_of_scores(sample, s.ratio)
    # A sample is judged as one batch, whatever the scope in training.
    sample |= selected.mark(sample, dataclasses.replace(run.selection, scope="batch"))
    np.savez_compressed(samples, **sample)  # type: ignore[arg-type]
    if c.eval.tasks:
        params, shape = models["policy"]
        found = harness.evaluate(
            Scorer(params, shape, run.tokenizer, batch_size=c.score.batch_size),
            c.eval.tasks,
            out=run.folder / "benchmarks",
            data_dir=c.eval.data_dir,
            limit=c.eval.limit or None,
        )
        result["tasks"] = found["tasks"]
        say("evaluate", f"benchmarks of the policy\n{harness.table(found)}")
    jsonfile.write(out, result)
    return None


def report(run: Run) -> None:
    """report.html, made anew from what the run's folder holds."""
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


STAGES: dict[str, Callable[[Run], None]] = {
    stage.__name__: stage for stage in (prepare, reference, score, train, evaluate, report)
}


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
    for domain, r in result.get("reference", {}).items():
        if domain in c.data.clean and result["policy"][domain]["loss"] < r["loss"]:
            say(
                "evaluate",
                f"WARNING: the policy now knows {domain} better than its reference: "
                "excess loss had little left to say; use a stronger reference.",
            )


def _sample(run: Run, policy: Model, ref: Model | None) -> dict[str, np.ndarray]:
    """Held-out corpus rows [R, S+1] with what the policy and the reference make of them [R, S]."""
    heldout = run.heldout_rows()
    domains = [heldout[name] for name in run.config.data.corpus if name in heldout]
    each = min(SAMPLE_ROWS // max(len(domains), 1), run.config.eval.rows)
    views = {"": policy} if ref is None else {"": policy, "ref_": ref}
    score_fns = {
        prefix: functools.partial(
            jax.jit(
                functools.partial(
                    scoring.score_step,
                    apply=apply_fn(shape),
                    chunk_tokens=run.config.loss_chunk_tokens,
                    entropy=True,
                )
            ),
            params,
        )
        for prefix, (params, shape) in views.items()
    }
    return selected.sample(
        domains, score_fns, rows_each=each, batch_size=run.config.score.batch_size, put=run.put
    )


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
