"""Loss and bits per byte on held-out text, per domain."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rho1_jax.data.loader import Rows, ordered_batches
from rho1_jax.errors import InputError
from rho1_jax.models import placement
from rho1_jax.slm.step import Batch, Metrics


def heldout_losses(
    eval_fn: Callable[[Any, Batch], Metrics],
    params: Any,
    domains: Mapping[str, Rows],
    *,
    max_rows: int,
    batch_size: int,
    put: Callable[[dict[str, np.ndarray]], Batch],
) -> dict[str, dict[str, float]]:
    """domain -> {"loss": nats per token, "bits_per_byte", "tokens"} over its first `max_rows` rows.

    `put` places a host batch on the devices. Bits per byte counts the UTF-8 bytes of the targets'
    text, so it compares models with different tokenizers. InputError for a domain whose rows have
    no token to predict.
    """
    return {
        domain: _one(
            domain, eval_fn, params, rows, max_rows=max_rows, batch_size=batch_size, put=put
        )
        for domain, rows in domains.items()
    }


def _one(
    domain: str, eval_fn, params, rows: Rows, max_rows: int, batch_size: int, put
) -> dict[str, float]:
    sums, n_bytes = [], 0
    stop = min(max_rows, len(rows))
    for batch in ordered_batches(rows, batch_size=batch_size, stop_row=stop):
        sums.append(placement.in_turn(eval_fn(params, put(batch))))
        n_bytes += int(batch["bytes"].sum())
    sums = jax.device_get(sums)  # one wait for all
    nats, tokens = (math.fsum(float(s[key]) for s in sums) for key in ("loss", "tokens"))
    if not tokens:
        raise InputError(
            f"The held-out rows of {domain} have no token to predict: where prompts fill the rows, "
            "make data.seq_len larger."
        )
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "tokens": int(tokens),
    }
