"""The kept tokens as row numbers, so that work can be done on them alone.

Tokens are cut into G groups of n, one for each device that holds a part of the batch: rows are
numbered, gathered and put back within their group, so that none of it crosses devices. A gather
by one global list of indices would send the whole matrix to every device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from rho1_jax.slm.selection import Selection

_SLACK = 1.1  # groups of a batch-wide selection keep unequal numbers of tokens


class Rows(NamedTuple):
    """Kept rows, ascending, and for every row its place among them.

    ids: up to C row numbers of each group; where fewer are kept, the rest is n.
    rank: the place of each row in `ids`, -1 if it is not kept.
    """

    ids: Int32[Array, "G C"]
    rank: Int32[Array, "G n"]

    @property
    def fit(self) -> Bool[Array, ""]:
        """Whether every group keeps at most C rows; if not, `ids` misses some."""
        return self.rank.max() < self.ids.shape[1]

    @property
    def weight(self) -> Float[Array, " M"]:
        """1 where `ids` names a row, 0 where it fills up."""
        return (self.ids < self.rank.shape[1]).astype(jnp.float32).reshape(-1)


class Capacity(NamedTuple):
    """Most rows that one of `groups` groups may keep; `sure` if it never keeps more."""

    groups: int
    rows: int
    sure: bool


def capacity(selection: Selection, batch: int, seq_len: int, *, accumulated: bool) -> Capacity:
    """The Capacity of a selection on [batch, seq_len] tokens; a multiple of 8, as matmuls like it.

    accumulated: the mask is a part of a selection over several microbatches.
    """
    groups = selection.n_shards * selection.row_parts
    n_rows, length = batch // selection.n_shards, seq_len // selection.row_parts  # of a group
    n = n_rows * length
    share = max(selection.ratio, selection.last_ratio)  # where it moves, the largest must fit
    share *= len(selection.parts) if selection.score == "union" else 1
    if selection.trains_all or share >= 1.0:
        return Capacity(groups, n, True)
    sure = even(selection, accumulated=accumulated)
    share = share if sure else _SLACK * share
    of_row = math.ceil(share * length)
    kept = n_rows * of_row
    for domain in selection.domains:  # of one that keeps more, a row more than its share
        own = min(math.ceil(domain.ratio * length), length)
        kept += min(n_rows, math.ceil(domain.share * n_rows) + 1) * max(0, own - of_row)
    return Capacity(groups, min(n, -(-kept // 8) * 8), sure)


def even(selection: Selection, *, accumulated: bool) -> bool:
    """Whether every group keeps the same share: each competes for itself, or there is but one."""
    if selection.row_parts > 1 or selection.own_ratios:
        return False
    if selection.scope == "batch":
        return selection.n_shards == 1 and not accumulated
    return selection.scope != "microbatch" or selection.n_shards == 1


def find(mask: Bool[Array, "*tokens"], capacity: Capacity) -> Rows:
    """The rows where mask, in any shape, is True."""
    mask = mask.reshape(capacity.groups, -1)
    n = mask.shape[1]
    rank = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)

    def numbers(rank):
        place = jnp.where(rank < 0, n, rank)  # out of range: dropped
        empty = jnp.full(capacity.rows, n, jnp.int32)
        return empty.at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")

    return Rows(jax.vmap(numbers)(rank), rank)


def take(x: Shaped[Array, "N ..."], rows: Rows) -> Shaped[Array, "M ..."]:
    """The rows of x [N = G*n, ...] that `rows` names, [M = G*C, ...]; fillers are arbitrary."""
    groups = x.reshape(*rows.rank.shape, *x.shape[1:])
    pick = jax.vmap(lambda x, i: x.at[i].get(mode="clip", indices_are_sorted=True))
    return pick(groups, rows.ids).reshape(-1, *x.shape[1:])


def put(y: Shaped[Array, "M ..."], rows: Rows) -> Shaped[Array, "N ..."]:
    """The inverse of `take`: y in its rows, 0 elsewhere."""
    groups = y.reshape(*rows.ids.shape, *y.shape[1:])
    spread = jax.vmap(lambda y, i: y.at[jnp.maximum(i, 0)].get(mode="clip"))(groups, rows.rank)
    kept = rows.rank.reshape(*rows.rank.shape, *[1] * (y.ndim - 1)) >= 0
    return jnp.where(kept, spread, 0).astype(y.dtype).reshape(-1, *y.shape[1:])
