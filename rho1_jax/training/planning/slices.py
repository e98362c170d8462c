"""TPU slices that are not there: named as clouds do, described for the compiler.

v5e-16 and v6e-16 have 16 chips, v4-64 and v5p-64 have 64 cores on 32 chips.
"""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rho1_jax.errors import InputError, require_known
from rho1_jax.training import sharding

# libtpu would ask the cloud who it is, and lets only one process in, as on a host with TPUs.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Chip(NamedTuple):
    """Vendor's figures; `memory` is what the compiler lets a program use of it."""

    memory: float  # GiB
    peak: float  # bfloat16 FLOP/s
    clock: float  # Hz, at which the matrix units reach the peak
    links: float  # bytes/s that a chip sends to its neighbours, all together
    cores: int  # that the name of a slice counts, in one chip
    axes: int  # of the torus
    most: int  # chips of a slice


CHIPS = {
    "v4": Chip(30.75, 275e12, 1.05e9, 300e9, 2, 3, 4096),
    "v5e": Chip(15.75, 197e12, 1.50e9, 200e9, 1, 2, 256),
    "v5p": Chip(95.74, 459e12, 1.75e9, 600e9, 2, 3, 4096),
    "v6e": Chip(31.25, 918e12, 1.75e9, 448e9, 1, 2, 256),
}


def chip(topology: str) -> Chip:
    """Of a slice such as "v5p-64"; InputError if there is none of the name."""
    kind = topology.partition("-")[0]
    require_known("--topology: chip", kind, CHIPS)
    return CHIPS[kind]


def sides(topology: str) -> list[int]:
    """Chips along each side of a slice such as "v5p-64": as even a torus as its size allows."""
    kind, _, size = topology.partition("-")
    of = chip(topology)
    n = int(size) // of.cores if size.isdigit() else 0
    if n & (n - 1) or not 1 <= n <= of.most or n == 2:
        raise InputError(
            f"--topology={topology}: {kind} slices here are {kind}-{of.cores}, then powers of "
            f"two from {kind}-{4 * of.cores} to {kind}-{of.most * of.cores}."
        )
    if n == 4:
        return [2, 2, 1][: of.axes]  # one host
    bits = n.bit_length() - 1
    return sorted(2 ** ((bits + i) // of.axes) for i in range(of.axes))


def devices(topology: str) -> list[jax.Device]:
    """The described devices of a slice; they compile, but run nothing."""
    kind, torus = topology.partition("-")[0], sides(topology)
    for name, value in NO_TPU.items():
        os.environ.setdefault(name, value)
    both_cores = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{kind}:{'x'.join(map(str, torus))}",
            chips_per_host_bounds=[*(min(side, 2) for side in torus[:2]), 1],
            **both_cores,
        )
    except Exception as error:
        if "not installed" not in str(error):
            raise
        raise InputError(
            "There is no TPU compiler here: pip install libtpu brings it, in the version that "
            'pip install "jax[tpu]" would choose.'
        ) from error
    return list(described.devices)


def mesh_of(c: ConfigDict, topology: str) -> Mesh:
    """The config's mesh over the slice; InputError where its sizes do not lie along the torus."""
    try:
        return sharding.make_mesh(**c.mesh, devices=devices(topology))
    except NotImplementedError as error:
        raise InputError(
            f"mesh.data, fsdp, sequence and tensor do not lie along the sides of {topology}: make "
            f"each the product of some of {sides(topology)}."
        ) from error
