"""What keeping the documents of packed rows apart changes: held-out loss, and the selection.

    python -m experiments.separate_documents [--scale=tiny] [--seeds=3] --out=runs/separate

Reference, scores, training and evaluation are all of one kind: documents apart, or rows as one
text; from scratch, as configs/math.py. Every policy is evaluated both ways, since the two losses
are of different contexts.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.lab import pool, results, study, tables
from experiments.lab.study import CLM, Study
from rho1_jax.analysis import bootstrap
from rho1_jax.analysis.bootstrap import Interval
from rho1_jax.pipeline import models
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import sharding

METHODS: dict[str, dict[str, Any]] = {"SLM": {}, "CLM": CLM}
KINDS = {"apart": True, "one text": False}
FIRST = 16  # targets of a document whose context differs most


def run(this: Study) -> None:
    configs = {
        (method, kind, seed): _config(this, seed, {**changes, "data.separate_documents": apart})
        for seed in range(this.seeds)
        for method, changes in METHODS.items()
        for kind, apart in KINDS.items()
    }
    runs = this.run(configs)
    found = [
        {"method": method, "trained": trained, "seed": seed, "evaluated": evaluated,
         "domain": domain, "loss": loss}
        for (method, trained, seed), folder in runs.items()
        for evaluated, apart in KINDS.items()
        for domain, loss in _losses(folder, apart).items()
    ]  # fmt: skip
    shares = [
        _selection(*(runs["SLM", kind, seed] for kind in KINDS)) for seed in range(this.seeds)
    ]
    selection = tables.markdown(
        ("", "mean over seeds"),
        [(name, results.said(_mean(np.array([s[name] for s in shares])))) for name in shares[0]],
    )
    text = [_table(found, [*this.targets, *this.corpus]), selection]
    results.write(this, runs, found, "\n\n".join(text))


def _config(this: Study, seed: int, changes: dict[str, Any]) -> ConfigDict:
    c = this.config(seed, changes)
    c.model.init = ""
    return c


def _losses(folder: Path, apart: bool) -> dict[str, float]:
    """domain -> held-out nats per token of the policy, its documents apart or not."""
    config = ConfigDict(pool.config_of(folder).to_dict())
    config.data.separate_documents = apart
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        ws = Workspace(config, folder, mesh)
        params, shape = models.policy(ws)
        return {name: r["loss"] for name, r in models.heldout_fn(ws, shape)(params).items()}


def _table(found: list[dict[str, Any]], domains: list[str]) -> str:
    """Apart minus one text, paired by seed: trained and evaluated so, and evaluated alike."""

    def of(method: str, trained: str, evaluated: str, domain: str) -> np.ndarray:
        wanted = {"method": method, "trained": trained, "evaluated": evaluated, "domain": domain}
        return np.array([row["loss"] for row in found if wanted.items() <= row.items()])

    lines = []
    for method in METHODS:
        for domain in domains:
            a, b = KINDS
            pairs = [((a, a), (b, b)), ((a, a), (b, a)), ((a, b), (b, b))]
            less = [of(method, *x, domain) - of(method, *y, domain) for x, y in pairs]
            cells = [results.said(_mean(d), sign=True) for d in less]
            both = (f"{of(method, kind, kind, domain).mean():.3f}" for kind in KINDS)
            lines.append([method, domain, *both, *cells])
    head = ["method", "domain", "apart", "one text", "difference", "both evaluated apart"]
    return tables.markdown([*head, "both evaluated as one text"], lines)


def _mean(by_seed: np.ndarray) -> Interval:
    """With Student's interval over the seeds."""
    return bootstrap.mean_loss(by_seed[:, None], np.ones(1))


def _selection(apart: Path, one_text: Path) -> dict[str, float]:
    """Shares of the same held-out tokens: what both SLM policies select, and among those near
    their document's beginning."""
    with np.load(apart / "samples.npz") as a, np.load(one_text / "samples.npz") as b:
        valid, first = a["valid"], _first(a["tokens"][:, :-1]) & a["valid"]
        kept = {"apart": a["selected"], "one text": b["selected"]}
        loss = {"apart": a["loss"], "one text": b["loss"]}
        both = kept["apart"] & kept["one text"]
        out = {"selected by both, of those one selects": both.sum() / kept["apart"].sum()}
        out[f"first {FIRST} of a document, of all targets"] = first.sum() / valid.sum()
        for kind in KINDS:
            out[f"of these selected, {kind}"] = kept[kind][first].mean()
            out[f"loss of these, {kind}, nats"] = loss[kind][first].mean()
        if "useful" in a:
            for kind in KINDS:
                out[f"precision, {kind}"] = a["useful"][kept[kind]].mean()
        return {name: float(x) for name, x in out.items()}


def _first(inputs: np.ndarray) -> np.ndarray:
    """Whether a target is one of the first of a document that begins in the row; token 0 is the
    separator of a tokenizer that is trained here."""
    since = np.full(len(inputs), inputs.shape[1])
    out = np.zeros(inputs.shape, bool)
    for s, tokens in enumerate(inputs.T):
        since = np.where(tokens == 0, 0, since + 1)
        out[:, s] = since < FIRST
    return out


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
