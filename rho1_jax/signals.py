"""What selections read, as functions of a batch: a model's losses, utilities; and a sample of both.

On every host the functions return whole arrays, whatever part of the batch a host holds.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rho1_jax.data import loader, taggers
from rho1_jax.evaluation import selected
from rho1_jax.run import Model, Run
from rho1_jax.slm.step import Batch
from rho1_jax.training import scoring, utility
from rho1_jax.training.program import apply_fn

SAMPLE_ROWS = 64  # held-out rows, at most, whose tokens are shown and scores are judged on
STATES_PER_ROW = 128  # hidden states that relevance is made of

ScoreFn = Callable[[Batch], Mapping[str, Any]]


def loss_fn(run: Run, model: Model, *, entropy: bool) -> ScoreFn:
    """A batch -> {"ref_loss": [B, S]} and, if asked, "ref_entropy": in nats, of this model."""
    params, shape = model
    score_fn = jax.jit(
        functools.partial(
            scoring.score_step,
            apply=apply_fn(shape),
            chunk_tokens=run.config.loss_chunk_tokens,
            entropy=entropy,
        ),
        out_shardings=run.everywhere,
    )
    return functools.partial(score_fn, params)


def utility_fn(run: Run) -> ScoreFn:
    """A batch -> {"utility": [B, S]}: the run's select.utility."""
    kind, tags = taggers.parse_utility(run.config.select.utility)
    if kind == "tags":
        whole = jax.jit(lambda x: x, out_shardings=run.everywhere)
        return lambda batch: {
            "utility": utility.tagged(np.asarray(whole(batch.tokens)), run.tokenizer, tags)
        }
    params, shape = run.reference()
    apply = apply_fn(shape)
    hidden_fn = jax.jit(
        lambda params, tokens: apply(params, tokens[:, :-1])[0], out_shardings=run.everywhere
    )

    def states(domains: ConfigDict) -> np.ndarray:
        """Hidden states [N, D] of the first training rows of each domain."""
        found = []
        for name, rows in run.train_rows(domains).items():
            if not domains[name].weight:  # only evaluated on
                continue
            for batch in loader.ordered_batches(
                rows,
                batch_size=run.config.score.batch_size,
                stop_row=min(SAMPLE_ROWS, len(rows)),
            ):
                hidden = np.asarray(hidden_fn(params, run.put_whole(batch).tokens), np.float32)
                thin = max(1, run.config.data.seq_len // STATES_PER_ROW)
                found.append(hidden[batch["valid"]][::thin])
        return np.concatenate(found)

    c = run.config.data
    near = utility.centroids(states(c.clean), states(c.corpus))
    relevance = jax.jit(functools.partial(utility.relevance, apply), out_shardings=run.everywhere)
    return lambda batch: {"utility": relevance(params, batch.tokens, *near)}


def sample(run: Run, policy: Model, ref: Model | None) -> dict[str, np.ndarray]:
    """Held-out corpus rows [R, S+1] with what the policy and the reference make of them [R, S]."""
    heldout = run.heldout_rows()
    domains = [heldout[name] for name in run.config.data.corpus if name in heldout]
    each = min(SAMPLE_ROWS // max(len(domains), 1), run.config.eval.rows)
    views = {"": policy} if ref is None else {"": policy, "ref_": ref}
    score_fns = {prefix: loss_fn(run, model, entropy=True) for prefix, model in views.items()}
    if run.selection.needs_utility:
        score_fns["utility"] = utility_fn(run)
    return selected.sample(
        domains,
        score_fns,
        rows_each=each,
        batch_size=run.config.score.batch_size,
        put=run.put_whole,
    )
