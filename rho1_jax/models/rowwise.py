"""The seam between a block and its backward pass: how what acts on single rows is called."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class EveryRow:
    """Calls functions of rows plainly: the exact backward pass. `marks` pass through untouched.

    Another object with these methods may go back through fewer rows (slm/backward.py).
    """

    def start(self, batch: int, seq_len: int) -> Any:  # noqa: ARG002
        """The marks that accompany the residual stream."""
        return None

    def enter(self, marks):
        """Called at the bottom of each block."""
        return marks

    def __call__(self, f, marks, weights, *xs):
        """f(dot, weights, *xs), f acting on each row of the xs [N, ...] by itself."""
        return f(jnp.matmul, weights, *xs), marks

    def finish(self, hidden, marks):  # noqa: ARG002
        """Called at the top of the model."""
        return hidden
