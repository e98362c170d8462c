"""Where the model's arrays lie on a mesh, said wherever the compiler would not find it by itself.

`batch_axes` are the mesh axes that rows are split over, None without a mesh. Over all other axes
heads, feed-forward and vocabulary are.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

Axes = tuple[str, ...] | None


def other_axes(batch_axes: Axes) -> tuple[str, ...]:
    """The axes of the mesh in use that rows are not split over."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(name for name in names if name not in (batch_axes or ()))


def by_rows(x: Array, batch_axes: Axes) -> Array:
    """Activations [B, ...], split by rows alone."""
    if batch_axes is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes))


def gathered(w: Array, batch_axes: Axes, *, axis: int) -> Array:
    """A weight as its product takes it: whole on every device, but for the other axes on `axis`.

    Left alone the TPU's compiler passes activations round in rings instead: three times the
    estimated cycles of a step (docs/scale.md).
    """
    if batch_axes is None:
        return w
    spec: list[tuple[str, ...] | None] = [None] * w.ndim
    spec[axis] = other_axes(batch_axes)
    return jax.lax.with_sharding_constraint(w, PartitionSpec(*spec))
