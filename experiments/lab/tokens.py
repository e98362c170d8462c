"""The tokens of held-out rows, as each checkpoint of a finished run sees them."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import pool
from rho1_jax.data import loader, taggers
from rho1_jax.models.formats import load
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.pipeline import models
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.slm.selection import top_k_mask
from rho1_jax.training import program, sharding

Batches = list[dict[str, np.ndarray]]
CHECKPOINTS = 10  # of a run whose tokens are watched, and what it started from
MAX_ROWS = 256


class Tokens(NamedTuple):
    """N targets of held-out rows at C checkpoints; losses in nats per token.

    ref_loss, useful: None where the run has no reference, or the corpus does not know.
    """

    steps: np.ndarray  # [C], from 0
    losses: np.ndarray  # [C, N]
    ref_loss: Any  # [N]
    useful: Any  # bool [N]
    tag: np.ndarray  # [N], indices into taggers.TAGS
    row: np.ndarray  # [N]
    pieces: list[str]  # the text of each


def watched(steps: int) -> dict[str, int]:
    """Changes to a config of so many steps that keep CHECKPOINTS of them."""
    return {"checkpoint.every": max(1, steps // CHECKPOINTS), "checkpoint.keep": 2 * CHECKPOINTS}


def look(folder: Path, domain: str) -> Tokens:
    """The held-out rows of `domain`, at most MAX_ROWS of them, through the run's eyes."""
    config = pool.config_of(folder)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        run = Workspace(config, folder, mesh)
        rows = run.heldout_rows()[domain]
        batches = list(
            loader.ordered_batches(
                rows, batch_size=config.score.batch_size, stop_row=min(MAX_ROWS, len(rows))
            )
        )
        params, shape = models.initial(run)
        losses = [_losses(run, shape, params, batches)]
        saved = (folder / "checkpoints" / "steps").glob("[0-9]*")
        steps = sorted(int(path.name) for path in saved)
        place = functools.partial(sharding.parameter_shardings, mesh=mesh)
        for step in steps:
            params = load.saved_params(folder / "checkpoints", place, step=step)
            losses.append(_losses(run, shape, params, batches))
        ref_loss = None
        if run.caches_scores:
            params, shape = models.reference(run)
            ref_loss = _losses(run, shape, params, batches)

    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    tokens, valid = whole["tokens"], whole["valid"]
    pieces = np.array([run.tokenizer.pieces(row)[1:] for row in tokens], object)
    return Tokens(
        np.array([0, *steps]),
        np.stack(losses),
        ref_loss,
        whole["useful"][valid] if "useful" in whole else None,
        taggers.of_rows(tokens, run.tokenizer)[valid],
        np.broadcast_to(whole["row"][:, None], valid.shape)[valid],
        pieces[valid].tolist(),
    )


def _losses(run: Workspace, shape: LlamaConfig, params: Any, batches: Batches) -> np.ndarray:
    chunk_tokens = run.config.loss_chunk_tokens
    # With entropy as in the stage `evaluate`, where it is compiled already.
    score = program.score_fn(shape, run.mesh, chunk_tokens=chunk_tokens, entropy=True)
    found = [
        np.asarray(score(params, run.put(batch))["ref_loss"])[batch["valid"]] for batch in batches
    ]
    return np.concatenate(found)


def selections(seen: Tokens, ratio: float) -> np.ndarray:
    """bool [C, N]: the tokens with the highest excess loss at each checkpoint, as one batch."""
    keep = jax.jit(lambda loss: top_k_mask(loss, jnp.ones(loss.shape, bool), ratio))
    return np.stack([np.asarray(keep(loss - seen.ref_loss)) for loss in seen.losses])
