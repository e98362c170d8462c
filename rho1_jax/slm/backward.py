"""Selective backward: the blocks' backward pass on selected rows only. Approximate, and opt-in.

The gradient of the loss is zero in the hidden states of unselected tokens, but not below: later
tokens have attended to them. Here an unselected row keeps its residual path and its keys and
values, and drops the Jacobians of its query, its attention output and its feed-forward layer. The
gradient becomes a biased estimate; of the three units of work of those matrix products two shrink
to the selected share k, so a training step costs (2 + 4k) / 6 of plain training, and under full
rematerialisation, which then computes again the selected rows only, (2 + 6k) / 8.

The selection is made after the forward pass through the blocks, so it must reach their backward
pass from above. It comes with the cotangents: `Marks` is threaded through the model next to the
hidden states, plain zeros on the way up, and on the way down its cotangent holds the row numbers,
read off at the top from which rows of the hidden states' cotangent are not zero.
"""
# ruff: noqa: ARG001, ARG005 (the primal of a custom_vjp does not use what its backward pass does)

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rho1_jax.slm import rows as rows_lib
from rho1_jax.slm.rows import Capacity, Rows
from rho1_jax.slm.selection import Selection


class Marks(NamedTuple):
    """A cotangent's message. Float, since cotangents are; exact for groups below 2^24 rows."""

    ids: Float[Array, "G C"]
    rank: Float[Array, "G n"]
    blocks: Float[Array, ""]  # how many more blocks pass back selected rows only


@dataclasses.dataclass(frozen=True)
class SelectedRows:
    """The backward pass of a model's `top` uppermost blocks on selected rows.

    accumulated: the batches are microbatches (slm/rows.py).
    save_products: keep the matrix products of the forward pass; False computes those of the
      selected rows again, for models that are rematerialised anyway.
    """

    selection: Selection
    top: int
    n_blocks: int
    accumulated: bool = False
    save_products: bool = True

    def start(self, batch: int, seq_len: int) -> Marks:
        """What to thread through the blocks."""
        c = rows_lib.capacity(self.selection, batch, seq_len, accumulated=self.accumulated)
        n = batch * seq_len // c.groups
        return Marks(jnp.zeros((c.groups, c.rows)), jnp.zeros((c.groups, n)), jnp.zeros(()))

    def enter(self, marks: Marks) -> Marks:
        """To be called at the bottom of each block: counts it on the way back."""
        return _count_block(marks)

    def finish(self, hidden: Float[Array, "N D"], marks: Marks) -> Float[Array, "N D"]:
        """The hidden states unchanged; on the way back their cotangent starts the marks."""
        return _read_selection(self.top, hidden, marks)

    def __call__(
        self, f: Callable[..., Array], marks: Marks, weights: Any, *xs: Array
    ) -> tuple[Array, Marks]:
        """(f(dot, weights, *xs), marks), where f works on rows: each row of its result [N, ...]
        depends on the same row of the xs alone. f multiplies by `dot` where its backward pass
        needs the product again."""
        return _on_selected_rows(f, self, marks, weights, xs)

    @property
    def always(self) -> bool:
        """Whether no block ever goes through all rows."""
        return self.top >= self.n_blocks and rows_lib.even(
            self.selection, accumulated=self.accumulated
        )


@jax.custom_vjp
def _count_block(marks):
    return marks


def _count_back(_, marks):
    return (marks._replace(blocks=marks.blocks - 1),)


_count_block.defvjp(lambda marks: (marks, None), _count_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_selection(top, hidden, marks):
    return hidden


def _selection_of(top, marks, d_hidden):
    groups, n = marks.rank.shape
    selected = (d_hidden != 0).any(axis=-1)
    rows = rows_lib.find(selected, Capacity(groups, marks.ids.shape[1], sure=False))
    ids, rank = (x.astype(jnp.float32) for x in rows)
    started = Marks(ids, rank, jnp.float32(top))
    return d_hidden, started


_read_selection.defvjp(lambda top, hidden, marks: (hidden, marks), _selection_of)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_selected_rows(f, how, marks, weights, xs):
    return f(jnp.matmul, weights, *xs), marks


def _forward(f, how, marks, weights, xs):
    products = []

    def dot(x, w):
        products.append(x @ w)
        return products[-1]

    y = f(dot, weights, *xs)
    return (y, marks), (weights, xs, products if how.save_products else None)


def _backward(f, how, residuals, cotangents):
    weights, xs, products = residuals
    dy, marks = cotangents
    rows = Rows(marks.ids.astype(jnp.int32), marks.rank.astype(jnp.int32))
    active = marks.blocks > 0

    def pull(xs, products, dy):
        return jax.vjp(lambda w, xs: f(_replay(products), w, *xs), weights, xs)[1](dy)

    def on_rows(*per_row):
        xs, products, dy = jax.tree.map(lambda x: rows_lib.take(x, rows), per_row)
        d_weights, d_xs = pull(xs, products, dy * rows.weight[:, None].astype(dy.dtype))
        return d_weights, jax.tree.map(lambda dx: rows_lib.put(dx, rows), d_xs)

    def everywhere(xs, products, dy):
        dropped = active & (rows.rank < 0).reshape(-1, 1)
        return pull(xs, products, jnp.where(dropped, 0, dy))

    if how.always:
        return marks, *on_rows(xs, products, dy)
    return marks, *jax.lax.cond(active & rows.fit, on_rows, everywhere, xs, products, dy)


_on_selected_rows.defvjp(_forward, _backward)


def _replay(products):
    """A `dot` that returns known products; or computes them, where there are none."""
    if products is None:
        return jnp.matmul
    known = iter(products)
    return lambda x, w: _known_product(x, w, next(known))


@jax.custom_vjp
def _known_product(x, w, product):
    return product


_known_product.defvjp(
    lambda x, w, product: (product, (x, w)), lambda xw, dy: (dy @ xw[1].T, xw[0].T @ dy, None)
)
