"""Where arrays live: one mesh, one table of rules for parameters, rows split over the batch axes.

The model cuts long rows further, along their length, over the axis `sequence`
(models/placement.py); of the few bytes a token in a batch, devices that share a row hold all.

The compiler places everything else (Auto axes): give it sharded parameters and batches under
`jax.set_mesh(mesh)` and it inserts the collectives.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rho1_jax.errors import InputError
from rho1_jax.models.placement import SEQUENCE
from rho1_jax.slm.signals import CACHED
from rho1_jax.slm.step import Batch, TrainState

AXES = ("data", "fsdp", SEQUENCE, "tensor")
BATCH_AXES = ("data", "fsdp")
_CUT = ("fsdp", SEQUENCE)  # devices that share a row need not hold the same weights

# First match wins. Axes follow the parameter tree of models/llama.py; the leading L is never split.
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
    (r"^(embed|head)$", P("tensor", _CUT)),
    (r"^layers/(q|k|v|gate|up)$", P(None, _CUT, "tensor")),
    (r"^layers/(o|down)$", P(None, "tensor", _CUT)),
    (r"^(layers/(attn|mlp)|final)_norm$", P()),
)
# Parameters that only some architectures have. A test finds each rule used by one that has all.
OPTIONAL_RULES: tuple[tuple[str, P], ...] = (
    (r"^layers/(q|k|v)_bias$", P(None, "tensor")),
    (r"^layers/(q|k)_norm$", P()),
)


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all or some devices; one axis may be -1 and takes what the others leave."""
    n = jax.device_count() if devices is None else len(devices)
    sizes = {"data": data, "fsdp": fsdp, SEQUENCE: sequence, "tensor": tensor}
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
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 4, devices=devices)


def n_batch_shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def n_row_parts(mesh: Mesh) -> int:
    """Over how many devices each row is cut along its length."""
    return mesh.shape[SEQUENCE]


def token_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that activations are split over: LlamaConfig.batch_axes."""
    return (*BATCH_AXES, SEQUENCE) if n_row_parts(mesh) > 1 else BATCH_AXES


def require_divisible(batch_size: int, accumulation: int, mesh: Mesh, where: str) -> None:
    """InputError unless every microbatch spreads evenly over the devices.

    Where rows are cut over devices, these take one at a time: the tokens of several would no longer
    lie on a device in one piece.
    """
    shards, parts = n_batch_shards(mesh), n_row_parts(mesh)
    if batch_size % (shards * accumulation) == 0:
        if parts == 1 or batch_size == shards * accumulation:
            return
        more = "" if where == "score" else f", or {where}.accumulation to {batch_size // shards}"
        raise InputError(
            f"{where}.batch_size={batch_size} is more than one row at a time for each {parts} "
            f"devices of mesh.sequence: set it to {shards * accumulation}{more}."
        )
    raise InputError(
        f"{where}.batch_size={batch_size} rows do not divide over {shards} devices times "
        f"{accumulation} accumulation steps: make it a multiple of {shards * accumulation}."
    )


def require_even_cut(seq_len: int, mesh: Mesh) -> None:
    """InputError unless rows can be cut over the devices."""
    parts = n_row_parts(mesh)
    if seq_len % parts:
        raise InputError(
            f"data.seq_len={seq_len} targets do not divide over the {parts} devices of "
            f"mesh.sequence: make it a multiple of {parts}."
        )


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter (arrays or shapes), by the table of rules.

    A parameter without a rule, a rule without a parameter (unless it is optional), and an axis that
    does not divide are errors.
    """
    used = set()

    def place(path, leaf):
        name = _name(path)
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


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """Shardings of a TrainState (arrays or shapes): moments and ref_ema lie where their parameters
    lie. What is kept of a matrix by its rows and columns is small, and every device holds all of
    it."""
    replicated = NamedSharding(mesh, P())
    params = parameter_shardings(state.params, mesh)
    of_parameter = {
        _name(path): (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
        )
    }

    def of_moment(path, leaf) -> NamedSharding:
        shape, place = of_parameter.get(_name(path), (None, replicated))
        return place if leaf.shape == shape else replicated

    return TrainState(
        replicated,  # type: ignore[arg-type]
        params,
        jax.tree_util.tree_map_with_path(of_moment, state.opt_state),
        None if state.ref_ema is None else params,
        None if state.norms is None else replicated,  # type: ignore[arg-type]
    )


def _name(path: tuple[Any, ...]) -> str:
    """The parameter that a path, within a state or not, leads to: its last keys of dicts."""
    keys = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return "/".join(key.key for key in reversed(list(keys)))


def placed(abstract: Any, shardings: Any) -> Any:
    """Shapes together with where they lie: what a restore or a compilation asks for."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def host_parts(mesh: Mesh, host: int) -> tuple[tuple[int, ...], int]:
    """Which of how many equal parts of a batch's rows the devices of `host` hold.

    InputError if two hosts hold some of each other's rows, but not all.
    """
    holders = np.array([device.process_index for device in mesh.devices.flat])
    return parts_of(holders.reshape(n_batch_shards(mesh), -1), host)


def parts_of(holders: np.ndarray, host: int) -> tuple[tuple[int, ...], int]:
    """`host_parts` from the hosts that hold each shard of the batch, int [shards, devices].

    As few and large parts as possible: {4, 5, 6, 7} of 8 is part 1 of 2. Hosts that share a
    sequence or tensor axis hold the same.
    """
    n = len(holders)
    shards = {
        h: frozenset(np.flatnonzero((holders == h).any(1)).tolist()) for h in set(holders.flat)
    }
    distinct = set(shards.values())
    if sum(map(len, distinct)) > n or len(set(map(len, distinct))) > 1:
        raise InputError(
            f"mesh.sequence x mesh.tensor = {holders.shape[1]} cuts across the hosts unevenly: "
            "make it divide the number of devices of a host, or be a multiple of it."
        )
    mine = shards[host]
    for size in range(len(mine), 0, -1):
        parts = tuple(sorted({shard // size for shard in mine}))
        if n % size == 0 and len(parts) * size == len(mine):
            break
    return parts, n // size


def batch_to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh, *, whole: bool = False) -> Batch:
    """This host's rows (`host_parts`), put onto its devices as its part of the global batch.

    whole: `batch` has the rows of all hosts, and of them each takes its own.
    """
    sharding = NamedSharding(mesh, P(BATCH_AXES))

    def put(name: str) -> jax.Array:
        shape = batch[name].shape if whole else None
        return jax.make_array_from_process_local_data(sharding, batch[name], shape)

    cached = {name: put(name) for name in CACHED if name in batch}
    useful, domain = (put(name) if name in batch else None for name in ("useful", "domain"))
    return Batch(put("tokens"), put("valid"), cached, useful, domain)


def _require_even_split(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for size, axes in zip(shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if size % (n := math.prod(mesh.shape[axis] for axis in axes)):
            raise InputError(
                f"Parameter {name} {shape} does not divide over mesh.{' x mesh.'.join(axes)} "
                f"= {n}: use a size that divides {size}."
            )
