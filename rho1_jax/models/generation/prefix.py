"""Shared-prefix KV cache: what sequences have in common goes through the model once.

Few-shot prompts differ in their last question: all sequences of a batch share a prefix. Answers
that are ranked for one question differ in a few tokens at the end: a sequence has several tails.
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
from rho1_jax.models.attention import cached_attention, causal_attention
from rho1_jax.models.llama import LlamaConfig, Params

_UNIT = 32  # tokens: few lengths are compiled

# Keys and values of all layers, [L, 1, n, K, hd] each; None for n = 0.
Prefix = tuple[Array, Array] | None


def possible(config: LlamaConfig) -> bool:
    """Whether keys and values of a prefix do not depend on what follows it."""
    return config.rope_scaling is None or config.rope_scaling.kind != "dynamic"


def shared(rows: Sequence[Sequence[int]], most: int, config: LlamaConfig) -> int:
    """How many tokens, at most `most`, all rows have in common at their beginning.

    A multiple of 32. 0 for a single row, and where angles depend on a row's whole length.
    """
    if len(rows) < 2 or not possible(config):
        return 0
    # All others lie between these two.
    pairs = zip(min(rows, key=list), max(rows, key=list), strict=False)
    n = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, rows)))
    return max(0, min(n, most)) // _UNIT * _UNIT


def read(params: Params, tokens: Sequence[int], config: LlamaConfig) -> Prefix:
    """The KV cache of these tokens."""
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


def apply_tails(
    params: Params,
    kept: Any,
    lengths: Int[Array, " B"],
    owner: Int[Array, " R"],
    tails: Int[Array, "R C"],
    *,
    config: LlamaConfig,
) -> Float[Array, "R C D"]:
    """Hidden states of tails; tail i follows row owner[i] of those that `apply_after` kept.

    lengths: of those rows, the prefix included.
    """
    ends, own = lengths[owner][:, None], jnp.arange(tails.shape[1])
    positions = ends + own
    slots = jnp.broadcast_to(jnp.arange(kept[0].shape[3]), (len(owner), kept[0].shape[3]))
    of_row = jnp.broadcast_to((slots < ends)[:, None], (*tails.shape, slots.shape[1]))
    of_tail = jnp.broadcast_to(own[:, None] >= own, (*tails.shape, tails.shape[1]))
    visible = jnp.concatenate([of_row, of_tail], axis=2)
    if config.window is not None:
        places = jnp.concatenate([slots, positions], axis=1)
        visible &= positions[:, :, None] - places[:, None] < config.window

    def attend(q, k, v, before):
        k, v = (
            jnp.concatenate([old[owner], new.transpose(0, 2, 1, 3)], axis=2)
            for old, new in zip(before, (k, v), strict=True)
        )
        return cached_attention(q, k, v, visible), None

    return llama.apply_and_keep(
        params, tails, config=config, positions=positions, attend=attend, before=kept
    )[0]
