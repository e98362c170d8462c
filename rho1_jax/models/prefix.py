"""Prompts that begin alike: what a batch has in common is read once, by one row for all.

Few-shot prompts differ in their last question only, and so do the answers that are ranked for one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rho1_jax.models import llama
from rho1_jax.models.attention import causal_attention
from rho1_jax.models.llama import LlamaConfig, Params

_UNIT = 32  # tokens: few lengths are compiled

# Keys and values of all layers, [L, 1, n, K, hd] each; None for n = 0.
Prefix = tuple[Array, Array] | None


def shared(rows: Sequence[Sequence[int]], most: int, config: LlamaConfig) -> int:
    """How many tokens, at most `most`, all rows have in common at their beginning.

    A multiple of 32. 0 for a single row, and where angles depend on a row's whole length.
    """
    dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
    if len(rows) < 2 or dynamic:
        return 0
    # All others lie between these two.
    pairs = zip(min(rows, key=list), max(rows, key=list), strict=False)
    n = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, rows)))
    return max(0, min(n, most)) // _UNIT * _UNIT


def read(params: Params, tokens: Sequence[int], config: LlamaConfig) -> Prefix:
    """What every row after these tokens sees of them."""
    if not tokens:
        return None
    return _read(params, np.array([tokens], np.int32), config=config)


@functools.partial(jax.jit, static_argnames="config")
def _read(params: Params, tokens: Int[Array | np.ndarray, "1 n"], *, config: LlamaConfig) -> Prefix:
    def attend(q, k, v, _):
        return causal_attention(q, k, v, window=config.window), (k, v)

    alone = dataclasses.replace(config, batch_axes=None)  # one row is not split over a mesh
    return llama.apply_and_keep(params, tokens, config=alone, attend=attend)[2]


def apply_after(
    params: Params,
    before: Prefix,
    tokens: Int[Array | np.ndarray, "B S"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    config: LlamaConfig,
) -> tuple[Float[Array, "B S D"], Float[Array, "V D"], Any]:
    """Hidden states of rows of `lengths` tokens that follow `before`, and the head.

    Last come the keys and values of all layers, [L, B, K, n + S, hd] each, the prefix's included.
    """

    def whole(x, old):
        if old is None:
            return x
        return jnp.concatenate([jnp.broadcast_to(old, (len(x), *old.shape[1:])), x], axis=1)

    def attend(q, k, v, before):
        k, v = (whole(x, old) for x, old in zip((k, v), before or (None, None), strict=True))
        kept = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        return causal_attention(q, k, v, window=config.window, batch_axes=config.batch_axes), kept

    # What dynamic rope scaling takes for the length must be the row's, not the padded one.
    positions = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)
    positions += 0 if before is None else before[0].shape[2]
    return llama.apply_and_keep(
        params, tokens, config=config, positions=positions, attend=attend, before=before
    )
