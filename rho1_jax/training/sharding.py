"""Where arrays live: one mesh, one table of rules for parameters, rows split over the batch axes.

The compiler places everything else (Auto axes): give it sharded parameters and batches under
`jax.set_mesh(mesh)` and it inserts the collectives.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rho1_jax.errors import InputError
from rho1_jax.slm.step import Batch, TrainState

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# First match wins. Axes follow the parameter tree of models/llama.py; the leading L is never split.
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
    (r"^(embed|head)$", P("tensor", "fsdp")),
    (r"^layers/(q|k|v|gate|up)$", P(None, "fsdp", "tensor")),
    (r"^layers/(o|down)$", P(None, "tensor", "fsdp")),
    (r"^(layers/(attn|mlp)|final)_norm$", P()),
)
# Parameters that only some architectures have. A test finds each rule used by one that has all.
OPTIONAL_RULES: tuple[tuple[str, P], ...] = (
    (r"^layers/(q|k|v)_bias$", P(None, "tensor")),
    (r"^layers/(q|k)_norm$", P()),
)


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all or some devices; one axis may be -1 and takes what the others leave."""
    n = jax.device_count() if devices is None else len(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = math.prod(size for size in sizes.values() if size != -1)
    if given < 1 or list(sizes.values()).count(-1) > 1:
        raise InputError(f"The mesh {sizes} is not understood: sizes from 1, at most one -1.")
    sizes = {axis: n // given if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != n:
        asked = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise InputError(
            f"The mesh {asked} does not fit the {n} devices there are: make the product {n} "
            "(one axis may be -1 and takes the rest)."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def n_batch_shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def require_divisible(batch_size: int, accumulation: int, mesh: Mesh, where: str) -> None:
    """InputError unless every microbatch spreads evenly over the devices."""
    shards = n_batch_shards(mesh)
    if batch_size % (shards * accumulation) == 0:
        return
    raise InputError(
        f"{where}.batch_size={batch_size} rows do not divide over {shards} devices times "
        f"{accumulation} accumulation steps: make it a multiple of {shards * accumulation}."
    )


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter (arrays or shapes), by the table of rules.

    A parameter without a rule, a rule without a parameter (unless it is optional), and an axis that
    does not divide are errors.
    """
    used = set()

    def place(path, leaf):
        name = "/".join(key.key for key in path)
        for pattern, spec in PARAMETER_RULES + OPTIONAL_RULES:
            if re.search(pattern, name):
                used.add(pattern)
                _require_even_split(name, leaf.shape, spec, mesh)
                return NamedSharding(mesh, spec)
        raise InputError(f"No sharding rule matches parameter {name}: add one to PARAMETER_RULES.")

    shardings = jax.tree_util.tree_map_with_path(place, params)
    for pattern, _ in PARAMETER_RULES:
        if pattern not in used:
            raise InputError(f"Sharding rule {pattern} matches no parameter: remove or mend it.")
    return shardings


def state_shardings(state: TrainState, tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Shardings of a TrainState (arrays or shapes): moments lie where their parameters lie."""
    replicated = NamedSharding(mesh, P())
    params = parameter_shardings(state.params, mesh)
    opt_state = optax.tree_map_params(
        tx, lambda _, s: s, state.opt_state, params, transform_non_params=lambda _: replicated
    )
    return state._replace(step=replicated, params=params, opt_state=opt_state)  # type: ignore[arg-type]


def placed(abstract: Any, shardings: Any) -> Any:
    """Shapes together with where they lie: what a restore or a compilation asks for."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def batch_to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows, put onto its devices as its part of the global batch."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    arrays = {
        name: jax.make_array_from_process_local_data(sharding, batch[name])
        for name in Batch._fields
        if name in batch
    }
    return Batch(**arrays)


def _require_even_split(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(
                f"Parameter {name} {shape} does not divide over mesh axis {axis} of size "
                f"{mesh.shape[axis]}: use a size that divides {size}."
            )
