"""Scores that are computed of the corpus before training (the paper's section 5: future work).

`select.utility` names one, and the score stage keeps it beside the reference's losses:

    relevance          similarity of the reference's hidden states to those of the clean text
    tags:number,latex  1 for tokens of these tags (data/taggers.py), 0 for the others

A selection reads it as the score "utility", alone or among its parts.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rho1_jax.data import taggers
from rho1_jax.slm.losses import Apply

CENTROIDS = 16
_ROUNDS = 10  # of k-means: the centroids only have to cover the clean text


def tagged(
    tokens: Int[np.ndarray, "B T"], tokenizer: Any, tags: Iterable[str]
) -> Float[np.ndarray, "B S"]:
    """1 for the targets of rows [B, T = S+1] that have one of the tags."""
    wanted = [taggers.TAGS.index(tag) for tag in tags]
    return np.isin(taggers.of_rows(tokens, tokenizer), wanted).astype(np.float32)


def centroids(
    clean: Float[np.ndarray, "N D"], corpus: Float[np.ndarray, "M D"]
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "K D"]]:
    """(centre, directions): spherical k-means of clean hidden states, seen from between the two.

    Hidden states share one large direction; taken from the middle between the mean of the clean
    text and that of the corpus, directions tell the two apart.
    """
    centre = (clean.mean(0) + corpus.mean(0)) / 2
    x = _unit(clean - centre)
    found = x[np.linspace(0, len(x) - 1, min(CENTROIDS, len(x))).astype(int)]
    for _ in range(_ROUNDS):
        nearest = (x @ found.T).argmax(1)
        members = np.eye(len(found), dtype=x.dtype)[nearest]
        sums = members.T @ x
        found = np.where(members.any(0)[:, None], _unit(sums), found)
    return centre, found


def states(
    apply: Apply, params: Any, tokens: Int[Array, "B T"], *, every: int
) -> Float[Array, "B s D"]:
    """Each `every`-th hidden state of rows [B, T = S+1]: what centroids are made of.

    Thinned on the devices, before any host reads them as a whole.
    """
    return apply(params, tokens[:, :-1])[0][:, ::every]


def relevance(
    apply: Apply,
    params: Any,
    tokens: Int[Array, "B T"],
    centre: Float[Array, " D"],
    directions: Float[Array, "K D"],
) -> Float[Array, "B S"]:
    """Cosine, in [-1, 1], of what the model knows before each target of rows [B, T = S+1] to the
    nearest direction of the clean text."""
    hidden = apply(params, tokens[:, :-1])[0].astype(jnp.float32) - centre
    hidden /= jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-6)
    return jnp.max(jnp.einsum("bsd,kd->bsk", hidden, directions), axis=-1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
