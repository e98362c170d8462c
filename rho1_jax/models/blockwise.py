"""Attention of documents that do not see each other, block of queries by block.

How far back a block's queries see is known only when the rows are: of a few widths for its keys,
each compiled, the least that reaches every row's first document is taken. The backward pass is
written out (FlashAttention's, arXiv 2205.14135): through a choice of widths automatic
differentiation would keep the weights of all of them.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

_BLOCK = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: Float[Array, "B K G S hd"],
    k: Float[Array, "B K S hd"],
    v: Float[Array, "B K S hd"],
    starts: Int32[Array, "B S"],
    window: int | None,
) -> Float[Array, "B K G S hd"]:
    """Query s sees the keys starts[s] .. s, the last `window` of them. q is scaled already."""
    return _forward(q, k, v, starts, window)[0]


def _forward(q, k, v, starts, window):
    found = []
    for rows, choice, widths in _blocks(starts, window):

        def of(keys, q, k, v, starts, rows=rows):
            scores = _scores(q, k[:, :, keys], starts, rows, keys, window)
            most = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - most)
            total = weights.sum(axis=-1, keepdims=True)
            out = _per_head("bkrt,bktd->bkrd", weights.astype(v.dtype), v[:, :, keys], like=q)
            return (out / total).astype(v.dtype), most + jnp.log(total)

        found.append(_chosen(choice, widths, of, q[..., rows, :], k, v, starts[:, rows]))
    out, log_total = (jnp.concatenate(x, axis=3) for x in zip(*found, strict=True))
    return out, (q, k, v, starts, out, log_total)


def _backward(window, kept, d_out):
    q, k, v, starts, out, log_total = kept
    # What all weights of a query have in common of the softmax's Jacobian.
    shared = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_q = []
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, choice, widths in _blocks(starts, window):

        def of(keys, q, k, v, starts, d_out, log_total, shared, d_k, d_v, rows=rows):
            weights = jnp.exp(_scores(q, k[:, :, keys], starts, rows, keys, window) - log_total)
            more_v = _per_key(weights.astype(v.dtype), d_out)
            d_weights = _per_head("bkrd,bktd->bkrt", d_out, v[:, :, keys], like=weights)
            d_scores = (weights * (d_weights - shared)).astype(q.dtype)
            d_q = _per_head("bkrt,bktd->bkrd", d_scores, k[:, :, keys], like=q).astype(q.dtype)
            more_k = _per_key(d_scores, q)
            return d_q, d_k.at[:, :, keys].add(more_k), d_v.at[:, :, keys].add(more_v)

        cut = (x[..., rows, :] for x in (d_out, log_total, shared))
        args = q[..., rows, :], k, v, starts[:, rows], *cut, d_k, d_v
        found, d_k, d_v = _chosen(choice, widths, of, *args)
        d_q.append(found)
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


attend.defvjp(_forward, _backward)


def _blocks(starts: Array, window: int | None) -> Iterator[tuple[slice, Array, list[slice]]]:
    """Of each block its queries, its possible keys, nearest first, and which of these to take."""
    length = starts.shape[1]
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        least = 0 if window is None else max(0, start - window + 1)
        firsts, back = [], 0
        while start - back > least:
            firsts.append(start - back)
            back = max(_BLOCK, 2 * back)
        firsts.append(least)
        choice = (starts[:, start].min() < np.array(firsts[:-1], np.int32)).sum(dtype=jnp.int32)
        yield slice(start, stop), choice, [slice(first, stop) for first in firsts]


def _chosen(choice: Array, widths: list[slice], of: Callable, *args: Array):
    if len(widths) == 1:
        return of(widths[0], *args)
    return jax.lax.switch(choice, [functools.partial(of, keys) for keys in widths], *args)


def _scores(q, k, starts, rows: slice, keys: slice, window: int | None):
    """[B, K, G, s, t] in float32, -inf where a key is not seen."""
    queries, places = jnp.arange(rows.start, rows.stop)[:, None], jnp.arange(keys.start, keys.stop)
    seen = (places <= queries) & (places >= starts[..., None])
    if window is not None:
        seen &= queries - places < window
    scores = _per_head("bkrd,bktd->bkrt", q, k, like=q)
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _per_head(legend: str, x: Array, y: Array, *, like: Array) -> Array:
    """A product in float32; a group's queries are rows of one matrix: the shared keys are read
    once."""
    rows = x.reshape(*x.shape[:2], -1, x.shape[-1])
    product = jnp.einsum(legend, rows, y, preferred_element_type=jnp.float32)
    return product.reshape(*like.shape[:-1], -1)


def _per_key(x: Array, y: Array) -> Array:
    """Sum over the queries of all heads of a group: [B, K, t, hd] in float32."""
    x, y = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))
    return jnp.einsum("bkrt,bkrd->bktd", x, y, preferred_element_type=jnp.float32)
