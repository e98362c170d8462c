"""Offline scoring: the reference's loss (and entropy) of packed rows, one forward pass each."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rho1_jax.data.ref_scores import ScoreWriter
from rho1_jax.slm import signals
from rho1_jax.slm.losses import Apply
from rho1_jax.slm.step import Batch
from rho1_jax.training.interruption import Interrupted, StopSignal

FLUSH_EVERY = 50  # batches between two points a killed run can resume from


def score_step(
    params: Any, batch: Batch, *, apply: Apply, chunk_tokens: int, entropy: bool, top: int = 0
) -> dict[str, jax.Array]:
    """{"ref_loss": [B, S]} and, if asked, "ref_entropy": the reference's view of a batch, in
    nats; with `top` also its likeliest tokens (signals.py)."""
    names = ("ref_entropy",) if entropy else ()
    return signals.of_reference(
        apply, params, batch.tokens, chunk_tokens=chunk_tokens, names=names, top=top
    )


def score_rows(
    scored: Iterable[tuple[np.ndarray, Mapping[str, jax.Array | np.ndarray]]],
    writer: ScoreWriter | None,
    *,
    n_rows: int,
    label: str,
    stop: StopSignal,
) -> None:
    """Write what is `scored` batch by batch, the device a batch ahead of the disk.

    scored: pairs of the row numbers of a batch and the scores of all of it, on every host; of
    several hosts one has the writer. Raises Interrupted, with everything scored so far on disk,
    when `stop` says so.
    """
    pending, signum = None, None
    with stop.defer(), tqdm(total=n_rows, desc=label, unit="row", mininterval=1.0) as bar:
        for i, result in enumerate(scored):
            if pending is not None:
                bar.update(_write(writer, *pending))
            pending = result
            if writer and i % FLUSH_EVERY == FLUSH_EVERY - 1:
                writer.flush()
            if (signum := stop.now()) is not None:
                break
        if pending is not None:
            bar.update(_write(writer, *pending))
        if writer:
            writer.flush()
    if signum is not None:
        raise Interrupted(signum, f"{label}: saved what was scored")


def _write(
    writer: ScoreWriter | None, rows: np.ndarray, scored: Mapping[str, jax.Array | np.ndarray]
) -> int:
    real = rows >= 0  # the last batch is filled up with row -1
    values = {name: np.asarray(x)[real].reshape(real.sum(), -1) for name, x in scored.items()}
    if writer:
        writer.write(rows[real], values)
    return int(real.sum())
