"""Compile the training step for a TPU slice that is not there: does it fit, what does it cost?

    python -m rho1_jax.training.aot --config=configs/math.py:mistral --topology=v5p-64

It is the step of job.py, compiled by the TPU's own compiler on any host (`pip install libtpu`). A
topology is named as clouds do: v5e-16 and v6e-16 have 16 chips, v4-64 and v5p-64 have 64 cores on
32 chips. Slices are powers of two, from one chip to 256 (v5e, v6e) or 4096 (v4, v5p).
`--find_batch` looks for the largest train.batch_size that fits; `--config.key=value` overrides the
config, whose mesh must fit the topology; `--xla=name=value,...` goes to the compiler. The model is
model.preset with weights of no value.

The time is an estimate: cycles that the compiler expects of what it generates, at the chip's clock,
and the attention kernel's tiles at its peak rate; sorts are left out. The collectives' bytes over
the chip's links come on top as far as nothing hides them.
"""

import functools
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rho1_jax import command_line
from rho1_jax import config as config_lib
from rho1_jax.errors import InputError, require_known
from rho1_jax.models import llama, presets
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import step
from rho1_jax.slm.selection import Selection
from rho1_jax.training import cost, program, sharding

GIB = 2**30
OPTIONS = {"topology": "", "find_batch": False, "xla": ""}  # xla: the compiler's name=value,...
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


class DoesNotFit(InputError):
    """A program that needs more memory than a chip has."""


class Plan(NamedTuple):
    """One compiled step. Bytes and seconds are of one chip, FLOPs of all together."""

    chip: Chip
    n_chips: int
    batch_size: int  # rows
    tokens: int  # in a step
    arguments: int
    temporaries: int
    peak: int
    flops: float  # of all matrix products, what is computed twice counted twice
    kernel_flops: float  # of them inside kernels
    useful_flops: float  # of three forward passes, and one of a live reference
    program: cost.Program
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """The estimate with all collectives hidden."""
        kernels = self.kernel_flops / self.n_chips / self.chip.peak
        return self.program.cycles / self.chip.clock + kernels

    @property
    def link_seconds(self) -> float:
        """What the collectives take on the links."""
        return sum(t.bytes for t in self.program.traffic.values()) / self.chip.links

    @property
    def mfu(self) -> float:
        return self.useful_flops / self.n_chips / self.chip.peak / self.seconds


def sides(topology: str) -> list[int]:
    """Chips along each side of a slice such as "v5p-64": as even a torus as its size allows."""
    kind, _, size = topology.partition("-")
    require_known("--topology: chip", kind, CHIPS)
    chip = CHIPS[kind]
    n = int(size) // chip.cores if size.isdigit() else 0
    if n & (n - 1) or not 1 <= n <= chip.most or n == 2:
        raise InputError(
            f"--topology={topology}: {kind} slices here are {kind}-{chip.cores}, then powers of "
            f"two from {kind}-{4 * chip.cores} to {kind}-{chip.most * chip.cores}."
        )
    if n == 4:
        return [2, 2, 1][: chip.axes]  # one host
    bits = n.bit_length() - 1
    return sorted(2 ** ((bits + i) // chip.axes) for i in range(chip.axes))


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


def compile_step(config: ConfigDict, topology: str, xla: Mapping[str, str] | None = None) -> Plan:
    """The training step of `config` (its `train` section) compiled for a slice.

    xla: options of the compiler. DoesNotFit, an InputError, if a chip has too little memory.
    """
    config_lib.validate(config)
    c, t, chip = config, config.train, CHIPS[topology.partition("-")[0]]
    mesh = _mesh(c, topology)
    sharding.require_divisible(t.batch_size, t.accumulation, mesh, "train")
    sharding.require_even_cut(c.data.seq_len, mesh)
    selection = config_lib.selection(c, sharding.n_batch_shards(mesh), sharding.n_row_parts(mesh))
    live = config_lib.needs_reference(c) and not c.score.cached
    shape, ref_shape = (_shape(c, mesh, dtype) for dtype in (c.model.dtype, c.model.ref_dtype))
    key = jax.random.key(0)
    params = jax.eval_shape(functools.partial(llama.init, shape), key)
    _, tx = program.optimizer_of(t, t.steps)
    state = jax.eval_shape(functools.partial(step.init_state, tx=tx), params)

    # The mesh is only described: nothing may run on it, not even what makes a constant.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shardings = sharding.state_shardings(state, tx, mesh)
        ref_params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, c.model.ref_dtype, sharding=s),
            params,
            shardings.params,
        )
        jitted = program.train_step(
            t, shape, ref_shape, selection, tx, shardings, c.loss_chunk_tokens
        )
        traced = jitted.trace(
            sharding.placed(state, shardings),
            ref_params if live else None,
            _batch(c, mesh, selection, live),
            jax.eval_shape(lambda: key),
        )
        lowered = traced.lower()
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(xla or {}))
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, topology, t.batch_size) from error
    compile_seconds = time.perf_counter() - started
    memory, tokens = compiled.memory_analysis(), t.batch_size * c.data.seq_len
    flops = cost.flops(traced.jaxpr)
    return Plan(
        chip=chip,
        n_chips=mesh.size,
        batch_size=t.batch_size,
        tokens=tokens,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=flops,
        kernel_flops=flops - cost.flops(traced.jaxpr, kernels=False),
        useful_flops=tokens
        * program.flops_per_token(shape, ref_shape if live else None, c.data.seq_len),
        program=cost.read(compiled.as_text()),
        compile_seconds=compile_seconds,
    )


def largest_batch(config: ConfigDict, topology: str, xla: Mapping[str, str] | None = None) -> Plan:
    """The Plan of the largest train.batch_size that fits, rows in multiples of what the mesh asks.

    Bisection, a compilation each; DoesNotFit if not even the least fits.
    """
    config = config.copy_and_resolve_references()
    mesh = _mesh(config, topology)
    least = sharding.n_batch_shards(mesh) * config.train.accumulation
    one_row = sharding.n_row_parts(mesh) > 1  # at a time is what there can be
    best, fits, fails = None, 0, 2 if one_row else math.inf
    rows = 1 if one_row else max(1, config.train.batch_size // least)
    while fits + 1 < fails:
        config.train.batch_size = rows * least
        try:
            best, fits = compile_step(config, topology, xla), rows
            print(f"batch_size={rows * least} fits", flush=True)
        except DoesNotFit as error:
            if rows == 1:
                raise
            fails = rows
            print(error, flush=True)
        rows = 2 * fits if fails == math.inf else (fits + int(fails)) // 2
    assert best is not None
    return best


def report(plan: Plan) -> str:
    """The Plan for people."""
    p, chip = plan, plan.chip
    rows = [
        ("chips", f"{p.n_chips}, {p.batch_size} rows, {p.tokens:,} tokens in a step"),
        ("arguments", f"{p.arguments / GIB:.3f} GiB"),
        ("temporaries", f"{p.temporaries / GIB:.3f} GiB"),
        ("peak", f"{p.peak / GIB:.3f} of {chip.memory} GiB"),
        ("FLOPs", f"{p.flops / p.n_chips:.4g} a chip, in kernels {p.kernel_flops / p.n_chips:.4g}"),
        ("cycles", f"{p.program.cycles / 1e6:.1f} million, estimated, kernels left out"),
        ("time", f"{p.seconds:.3f} s, and up to {p.link_seconds:.3f} s of collectives"),
        ("MFU", f"{p.mfu:.1%} with all collectives hidden"),
        ("tokens a day", f"{p.tokens / p.seconds * 86_400:.3g} with all collectives hidden"),
    ]
    for kind, traffic in sorted(p.program.traffic.items()):
        rows.append((kind, f"{traffic.runs:,.0f} runs, {traffic.bytes / GIB:.3f} GiB sent"))
    if p.program.endless:
        rows.append(("loops", f"{p.program.endless} of unknown length, counted once"))
    if p.program.unknown:
        rows.append(("left out", f"{p.program.unknown} instructions without an estimate of cycles"))
    return "\n".join(f"{name:20s}{value}" for name, value in rows)


def _mesh(c: ConfigDict, topology: str) -> Mesh:
    """The config's mesh over the slice; InputError where its sizes do not lie along the torus."""
    try:
        return sharding.make_mesh(**c.mesh, devices=devices(topology))
    except NotImplementedError as error:
        raise InputError(
            f"mesh.data, fsdp, sequence and tensor do not lie along the sides of {topology}: make "
            f"each the product of some of {sides(topology)}."
        ) from error


def _shape(c: ConfigDict, mesh: Mesh, dtype: str) -> LlamaConfig:
    changes = {"vocab_size": c.tokenizer.vocab_size} if c.tokenizer.source == "train" else {}
    return presets.get(
        c.model.preset,
        dtype=dtype,
        remat=c.model.remat,
        batch_axes=sharding.token_axes(mesh),
        **changes,
    )


def _batch(c: ConfigDict, mesh: Mesh, selection: Selection, live: bool) -> step.Batch:
    rows, seq_len = c.train.batch_size, c.data.seq_len
    spread = NamedSharding(mesh, P(sharding.BATCH_AXES))

    def of(dtype, width=seq_len):
        return jax.ShapeDtypeStruct((rows, width), dtype, sharding=spread)

    return step.Batch(
        of(jnp.int32, seq_len + 1),
        of(jnp.bool),
        of(jnp.float32) if selection.needs_ref_loss and not live else None,
        of(jnp.float32) if selection.needs_ref_entropy and not live else None,
    )


def _explained(error: Exception, topology: str, batch_size: int) -> Exception:
    """DoesNotFit where the compiler ran out of the chip's memory."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text or "hbm" not in text.lower():
        return error
    found = re.search(r"Used ([\d.]+[MGT]) of ([\d.]+G) hbm", text) or re.search(
        r"\(([\d.]+[MGT])\) exceeds available HBM \(([\d.]+G)\)", text
    )
    needs, has = found.groups() if found else ("more", "what a chip has")
    return DoesNotFit(
        f"train.batch_size={batch_size} does not fit {topology}: needs {needs}iB of {has}iB a "
        "chip; try --find_batch, train.accumulation, model.remat=full, a larger mesh.fsdp, "
        "mesh.sequence or mesh.tensor, or more chips."
    )


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    try:
        found = command_line.parse(argv, OPTIONS)
        if not found.topology:
            raise InputError("--topology is missing: name a slice, for instance v5p-64.")
        find = largest_batch if found.find_batch else compile_step
        print(report(find(found.config, found.topology, _compiler_options(found.xla))))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _compiler_options(text: str) -> dict[str, str]:
    options = [option.partition("=") for option in text.split(",") if option]
    for name, equals, _ in options:
        if not equals:
            raise InputError(f"--xla: {name} has no value: write name=value, with commas between.")
    return {name: value for name, _, value in options}


if __name__ == "__main__":
    sys.exit(main(sys.argv))
