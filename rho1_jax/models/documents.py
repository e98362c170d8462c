"""The documents of packed rows: where each begins, so that none sees another.

The separator that ends a document (data/tokens.py) stands between two. As a target it is the end
of the first, predicted from it. As an input it is the beginning of the second, as a model's BOS is:
position 0, and all that the second's first token is predicted from. So every target keeps exactly
the context that it has in a row of its own, and none is lost at a border. A document that a row
cuts begins anew in the next row. Padding is separators, each a document by itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer


def starts(tokens: Integer[Array | np.ndarray, "B S"], separator: int) -> Int32[Array, "B S"]:
    """Where in its row the document of each input begins: the first token that it sees."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(tokens == separator, places, 0), axis=1)


def positions(starts: Int32[Array, "B S"]) -> Int32[Array, "B S"]:
    """The place of each input in its document, from 0 on."""
    return jnp.arange(starts.shape[1], dtype=jnp.int32) - starts


def lengths(starts: Int32[Array, "B S"]) -> Int32[Array, "B S"]:
    """How many tokens the document of each input has in its row."""
    n = starts.shape[1]
    is_last = jnp.pad(starts[:, 1:] != starts[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = jnp.where(is_last, jnp.arange(n, dtype=jnp.int32), n)
    return jax.lax.cummin(last, axis=1, reverse=True) + 1 - starts
