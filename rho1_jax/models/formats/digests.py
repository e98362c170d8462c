"""Digests: of parameter trees, where they lie, and of files, without reading all of them."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from rho1_jax.models import placement

_SAMPLES, _SAMPLE_BYTES = 64, 2**16


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one look at a tree of arrays tells."""

    digest: str  # hex, of every bit, name, shape and dtype; the sharding does not matter
    not_finite: tuple[str, ...]  # the arrays that hold a NaN or an infinity


def look(trees: Mapping[str, Any]) -> dict[str, Seen]:
    """What each tree holds, computed on the devices that have it; one wait for all arrays."""
    named = {
        key: [(_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(t)]
        for key, t in trees.items()
    }
    leaves = [x for pairs in named.values() for _, x in pairs]
    computed = [placement.in_turn(program(getattr(x, "sharding", None))(x)) for x in leaves]
    sums = iter(jax.device_get(computed))
    seen = {}
    for key, pairs in named.items():
        digest, not_finite = hashlib.sha256(), []
        for name, x in pairs:
            checksum, found = next(sums).tolist()
            digest.update(f"{name} {x.shape} {x.dtype} {checksum};".encode())
            not_finite += [name] if found else []
        seen[key] = Seen(digest.hexdigest(), tuple(not_finite))
    return seen


def _name(path: tuple[Any, ...]) -> str:
    """As in ['layers']['q']. Checkpoints give named tuples back as dicts, and must match."""
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
    return "".join(f"['{key}']" for key in keys)


def fingerprint(tree: Any) -> str:
    """The digest of one tree."""
    return look({"": tree})[""].digest


def of_files(files: Iterable[Path]) -> str:
    """Hex digest of names, sizes and samples of files: 64 of 64 KiB, evenly spread over each.

    Cheap for weights of any size. Files of up to 4 MiB are read whole; in a larger one a change
    between the samples is not seen.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = os.stat(path).st_size
        digest.update(f"{path.name} {size};".encode())
        with path.open("rb") as stream:
            last = max(size - _SAMPLE_BYTES, 0)
            for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@functools.cache
def program(sharding: jax.sharding.Sharding | None) -> jax.stages.Wrapped:
    """The compiled function from an array that lies so to [its checksum, how many devices hold
    something of it that is not finite]: what `look` runs.

    Each device reduces its own part, and what goes between devices is their sums. Left to the
    partitioner, such a reduction would gather them; and of two that it can sum up one by one the
    CPU's backend would hold what they reduce in memory, and take 25 times as long.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.jit(lambda x: _sums(x, PartitionSpec()))
    mesh, spec = sharding.mesh, sharding.spec
    axes = [name for part in spec for name in _names(part)]

    def part_of(x: Array) -> Array:
        sums = _sums(x, spec)
        return jax.lax.psum(sums, axes) if axes else sums

    def all_parts(x: Array) -> Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # not the one that is set
            return jax.shard_map(part_of, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())(x)

    return jax.jit(all_parts)


def _sums(x: Array, spec: PartitionSpec) -> UInt32[Array, "2"]:
    """Of a device's part of an array: the checksum, and 1 if something in it is not finite."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    bits = x.astype(jnp.uint32)
    if floating:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Each is weighted by its own odd number, so that order counts as well as value.
    weights = _positions(x.shape, spec) * jnp.uint32(2654435762) + jnp.uint32(1)
    mixed = (bits ^ (bits >> 15)) * weights
    not_finite = ~jnp.isfinite(x) if floating else jnp.zeros(x.shape, bool)
    checksum, found = jax.lax.reduce(
        (mixed ^ (mixed >> 13), not_finite),
        (jnp.uint32(0), jnp.bool_(False)),
        lambda a, b: (a[0] + b[0], a[1] | b[1]),
        range(x.ndim),
    )
    return jnp.stack([checksum, found.astype(jnp.uint32)])


def _positions(shape: tuple[int, ...], spec: PartitionSpec) -> UInt32[Array, "..."]:
    """Row-major positions, modulo 2**32, in the whole array, of a part that is this device's."""
    positions = jnp.zeros(shape, jnp.uint32)
    parts = (*spec, *[None] * (len(shape) - len(spec)))
    for axis, (n, part) in enumerate(zip(shape, parts, strict=True)):
        step = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        if names := _names(part):
            step += jax.lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(n % 2**32)
            n *= jax.lax.axis_size(names)
        positions = positions * jnp.uint32(n % 2**32) + step
    return positions


def _names(part: Any) -> tuple[str, ...]:
    """The mesh axes that one axis of an array is split over."""
    return (part,) if isinstance(part, str) else tuple(part or ())
