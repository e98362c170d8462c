"""Where the model's arrays lie on a mesh, said wherever the compiler would not find it by itself.

`batch_axes` are the mesh axes that tokens are split over, None without a mesh: whole rows over the
first, and each row along its length (context parallelism) over the last, where that is SEQUENCE.
Over all other axes heads, feed-forward and vocabulary are.
"""

import functools
import logging
import math
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

T = TypeVar("T")
Axes = tuple[str, ...] | None
SEQUENCE = "sequence"
_log = logging.getLogger("rho1_jax")


def platform() -> str:
    """Of the devices in use, also where a mesh only describes them (planning/aot.py): "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def in_turn(x: T) -> T:
    """What a program gave, on several CPU devices once it is there.

    They are threads: of two programs at once, each of whose devices wait for each other, one may
    take the threads that the other needs, and neither would end. For programs that do not need
    each other's results and so would all begin; accelerators run theirs in order.
    """
    simulated = jax.default_backend() == "cpu" and jax.device_count() > 1
    return jax.block_until_ready(x) if simulated else x


@functools.cache  # once for each reason
def kernel_not_used(device: str, kernel: str, why: str) -> None:
    """Say that attention is slower than it could be."""
    _log.warning(
        "attention on this %s is einsum, not the faster %s kernel: %s", device, kernel, why
    )


def split(batch_axes: Axes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that whole rows lie on, and those (one at most) that cut them."""
    axes = batch_axes or ()
    rows = tuple(axis for axis in axes if axis != SEQUENCE)
    return rows, axes[len(rows) :]


def parts(batch_axes: Axes) -> int:
    """How many devices each row is cut over."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in split(batch_axes)[1])


def other_axes(batch_axes: Axes) -> tuple[str, ...]:
    """The axes of the mesh in use that tokens are not split over."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(name for name in names if name not in (batch_axes or ()))


def by_tokens(x: Array, batch_axes: Axes) -> Array:
    """Activations [N = B*S, ...], split by tokens alone."""
    if batch_axes is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes))


def whole_rows(x: Array, batch_axes: Axes) -> Array:
    """Keys or values [B, K, S, hd], each row whole; over the other axes as they are."""
    rows, _ = split(batch_axes)
    spec = PartitionSpec(rows, PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, spec)


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
