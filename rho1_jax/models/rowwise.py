"""The seam between a block and its backward pass: how what acts on single rows is called."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class EveryRow:
    """Calls functions of rows plainly: the exact backward pass. `marks` pass through untouched.

    Another object with these methods may go back through fewer rows (slm/backward.py).
    dot: the product that functions of rows are given.
    """

    dot: Callable[[Array, Array], Array] = jnp.matmul

    def start(self, batch: int, seq_len: int) -> Any:  # noqa: ARG002
        """The marks that accompany the residual stream."""
        return None

    def enter(self, marks):
        """Called at the bottom of each block."""
        return marks

    def __call__(self, f, marks, weights, *xs):
        """f(dot, weights, *xs), f acting on each row of the xs [N, ...] by itself."""
        return f(self.dot, weights, *xs), marks

    def finish(self, hidden, marks):  # noqa: ARG002
        """Called at the top of the model."""
        return hidden


def times_transposed(
    x: Float[Array, "N D"], w: Float[Array, "E D"], dtype: Any = None
) -> Float[Array, "N E"]:
    """x @ w.T in `dtype`, fast where N is a handful: a weight is read once and used little.

    In GB of weights a second, float32, one core with AVX-512, N=8: [1536, 576] 15 this way, 9 as
    x @ w of the untransposed weight, 6 as plain x @ w.T; [576, 1536] 11, 9, 7. The barrier keeps
    the compiler from making the last of these of it. One row takes x @ w.T best: 26 GB a second.
    """
    if len(x) == 1:
        return jnp.matmul(x, w.T, preferred_element_type=dtype)
    product = jnp.einsum("ed,nd->en", w, x, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(product).T
