"""Stage 3: what the selection reads of every row that training will read, computed once.

The reference's loss (and entropy) in scores/, a utility in utility/. On every host the functions
that score return whole arrays, whatever part of the batch a host holds.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rho1_jax.data import given_scores, loader, ref_scores, taggers
from rho1_jax.pipeline import models
from rho1_jax.pipeline.models import Model
from rho1_jax.pipeline.workspace import Workspace, say
from rho1_jax.slm.signals import TOP
from rho1_jax.slm.step import Batch
from rho1_jax.training import hosts, program, scoring, sharding, utility

CENTROID_ROWS = 64  # training rows of each domain, at most, that relevance is made of
STATES_PER_ROW = 128  # hidden states of each of them

ScoreFn = Callable[[Batch], Mapping[str, Any]]
Results = tuple[np.ndarray, Mapping[str, Any]]  # row numbers of a batch, and their scores
Scored = Callable[[str, loader.Rows, np.ndarray], Iterable[Results]]  # of a domain, rows of it


def check(ws: Workspace) -> None:
    """InputError if the batches do not fit the devices, or given scores lack what is read."""
    sharding.require_divisible(ws.config.score.batch_size, 1, ws.mesh, "score")
    if ws.given_scores:
        given_scores.require(ws.given_scores, ws.score_fields)


def run(ws: Workspace) -> None:
    """Scores what is missing; loads the reference only where something is."""
    c = ws.config
    ref = functools.cache(lambda: models.reference(ws))
    if ws.selection.needs_utility:
        _score_rows(ws, "utility", ("utility",), _computed(ws, lambda: utility_fn(ws, ref)))
    if not ws.selection.needs_reference:
        return say("score", f"select.score={c.select.score} reads no reference, skipped")
    if not ws.caches_scores:
        return say("score", "the reference runs in every training step, nothing to keep")
    fields, top = ws.score_fields, ws.selection.top
    if ws.given_scores:
        scored: Scored = functools.partial(given_scores.read, ws.given_scores, fields)
    else:
        entropy = "ref_entropy" in fields
        scored = _computed(ws, lambda: loss_fn(ws, ref(), entropy=entropy, top=top))
    return _score_rows(ws, "scores", fields, scored)


def loss_fn(ws: Workspace, model: Model, *, entropy: bool, top: int = 0) -> ScoreFn:
    """A batch -> {"ref_loss": [B, S]} and, if asked, "ref_entropy": in nats, of this model; with
    `top` also its likeliest tokens."""
    params, shape = model
    chunk_tokens = ws.config.loss_chunk_tokens
    score_fn = program.score_fn(shape, ws.mesh, chunk_tokens=chunk_tokens, entropy=entropy, top=top)
    return functools.partial(score_fn, params)


def utility_fn(ws: Workspace, ref: Callable[[], Model]) -> ScoreFn:
    """A batch -> {"utility": [B, S]}: the run's select.utility."""
    kind, tags = taggers.parse_utility(ws.config.select.utility)
    if kind == "tags":
        whole = jax.jit(lambda x: x, out_shardings=ws.everywhere)
        return lambda batch: {
            "utility": utility.tagged(np.asarray(whole(batch.tokens)), ws.tokenizer, tags)
        }
    params, shape = ref()
    apply = program.apply_fn(shape)
    thin = max(1, ws.config.data.seq_len // STATES_PER_ROW)
    hidden_fn = jax.jit(
        functools.partial(utility.states, apply, every=thin), out_shardings=ws.everywhere
    )

    def states(domains: ConfigDict) -> np.ndarray:
        """Hidden states [N, D] of the first training rows of each domain."""
        found = []
        for name, rows in ws.train_rows(domains).items():
            if not domains[name].weight:  # only evaluated on
                continue
            for batch in loader.ordered_batches(
                rows,
                batch_size=ws.config.score.batch_size,
                stop_row=min(CENTROID_ROWS, len(rows)),
            ):
                hidden = np.asarray(hidden_fn(params, ws.put_whole(batch).tokens), np.float32)
                found.append(hidden[batch["valid"][:, ::thin]])
        return np.concatenate(found)

    c = ws.config.data
    near = utility.centroids(states(c.clean), states(c.corpus))
    relevance = jax.jit(functools.partial(utility.relevance, apply), out_shardings=ws.everywhere)
    return lambda batch: {"utility": relevance(params, batch.tokens, *near)}


def _computed(ws: Workspace, score_fn: Callable[[], ScoreFn]) -> Scored:
    """What `score_fn()` makes of rows; it is called when the first rows are missing."""
    score_fn = functools.cache(score_fn)

    def scored(_name: str, rows: loader.Rows, todo: np.ndarray) -> Iterable[Results]:
        size, score = ws.config.score.batch_size, score_fn()
        batches = loader.batches_of(rows, todo, batch_size=size, **ws.parts)
        return ((batch["row"], score(ws.put(batch))) for batch in batches)

    return scored


def _score_rows(ws: Workspace, folder: str, fields: Sequence[str], scored: Scored) -> None:
    """Every row that training will read, scored into `folder`/DOMAIN."""
    all_rows = ws.train_rows(ws.config.data.corpus)
    for name, row_ids in ws.visited_rows.items():
        rows = all_rows[name]
        create = functools.partial(
            ref_scores.create,
            ws.folder / folder / name,
            n_rows=len(rows),
            seq_len=rows.seq_len,
            fields=fields,
            binding=ws.score_binding(rows, folder),
            widths={name: ws.selection.distill_top for name in fields if name in TOP},
        )
        writer = hosts.once(create)
        missing = np.isin(row_ids, writer.missing(row_ids) if writer else [])
        todo = row_ids[hosts.of_first(missing)]
        if not todo.size:
            say("score", f"{name} is finished, skipped")
            continue
        scoring.score_rows(
            scored(name, rows, todo), writer, n_rows=todo.size, label=f"score {name}", stop=ws.stop
        )
