"""Compile a run for a TPU slice that is not there: does it fit, what does its step cost?

    python -m rho1_jax.training.planning.aot --config=configs/math.py:mistral --topology=v5p-64

It is the step that the stage train runs, and the programs of the stages around it (around.py),
compiled by the TPU's own compiler on any host (`pip install libtpu`). A topology is named as clouds
do: v5e-16 and v6e-16 have 16 chips, v4-64 and v5p-64 have 64 cores on 32 chips. Slices are powers
of two, from one chip to 256 (v5e, v6e) or 4096 (v4, v5p).
`--find_batch` looks for the largest train.batch_size that fits; `--config.key=value` overrides the
config, whose mesh must fit the topology; `--xla=name=value,...` goes to the compiler. The model is
model.preset with weights of no value.

The time is an estimate: cycles that the compiler expects of what it generates, at the chip's clock,
and the attention kernel's tiles at its peak rate; sorts are left out. The collectives' bytes over
the chip's links come on top as far as nothing hides them.
"""

import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rho1_jax import command_line, config_file
from rho1_jax import config as config_lib
from rho1_jax.errors import InputError
from rho1_jax.models import presets
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.training import program, sharding
from rho1_jax.training.planning import around, cost, slices
from rho1_jax.training.planning.around import Needs
from rho1_jax.training.planning.slices import Chip

GIB = 2**30
OPTIONS = {"topology": "", "find_batch": False, "xla": ""}  # xla: the compiler's name=value,...
_STEP = (
    "--find_batch, train.accumulation, model.remat=full, a larger mesh.fsdp, mesh.sequence or "
    "mesh.tensor, or more chips"
)


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


def compile_step(config: ConfigDict, topology: str, xla: Mapping[str, str] | None = None) -> Plan:
    """The training step of `config` (its `train` section) compiled for a slice.

    xla: options of the compiler. DoesNotFit, an InputError, if a chip has too little memory.
    """
    config_lib.validate(config)
    c, t, chip = config, config.train, slices.chip(topology)
    mesh = slices.mesh_of(c, topology)
    sharding.require_divisible(t.batch_size, t.accumulation, mesh, "train")
    sharding.require_even_cut(c.data.seq_len, mesh)
    # The mesh is only described: nothing may run on it, not even what makes a constant.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        built = build(c, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = built.step.trace(built.state, built.ref_params, built.batch, key)
        lowered = traced.lower()
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(xla or {}))
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, f"train.batch_size={t.batch_size}", topology, _STEP) from error
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
        useful_flops=tokens * built.flops_per_token,
        program=cost.read(compiled.as_text()),
        compile_seconds=compile_seconds,
    )


def compile_around(
    config: ConfigDict, topology: str, xla: Mapping[str, str] | None = None
) -> dict[str, tuple[Needs, dict[str, cost.Traffic]]]:
    """What each program around the step takes, and sends, on a slice: around.programs, by name.

    DoesNotFit if a chip has too little memory for one, beside what lies there meanwhile.
    """
    config_lib.validate(config)
    mesh, chip = slices.mesh_of(config, topology), slices.chip(topology)
    sharding.require_divisible(config.score.batch_size, 1, mesh, "score")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        programs = around.programs(config, *_shapes(config, mesh), mesh)
    found = {}
    for name, (lowered, beside, smaller) in programs.items():
        what = f"the program `{name}`, beside {beside / GIB:.2f} GiB,"
        try:
            compiled = lowered.compile(compiler_options=dict(xla or {}))
        except jax.errors.JaxRuntimeError as error:
            raise _explained(error, what, topology, smaller) from error
        needs = around.needs(compiled, beside)
        if needs.total > chip.memory * GIB:
            raise _does_not_fit(
                what, topology, f"{needs.total / GIB:.2f}G", f"{chip.memory}G", smaller
            )
        found[name] = needs, cost.read(compiled.as_text()).traffic
    return found


def largest_batch(config: ConfigDict, topology: str, xla: Mapping[str, str] | None = None) -> Plan:
    """The Plan of the largest train.batch_size that fits, rows in multiples of what the mesh asks.

    Bisection, a compilation each; DoesNotFit if not even the least fits.
    """
    config = config.copy_and_resolve_references()
    mesh = slices.mesh_of(config, topology)
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


def report_around(found: Mapping[str, tuple[Needs, Mapping[str, cost.Traffic]]], plan: Plan) -> str:
    """What is around the step, for people, and the peak of the whole run."""
    columns = ("around the step", "arguments", "temporaries", "beside", "peak", "sent, GiB")
    lines = ["{:20s}{:>12s}{:>12s}{:>12s}{:>12s}{:>12s}".format(*columns)]
    for name, (needs, traffic) in found.items():
        sent = sum(t.bytes for t in traffic.values())
        sizes = (needs.arguments, needs.temporaries, needs.beside, needs.total, sent)
        lines.append(f"{name:20s}" + "".join(f"{size / GIB:12.3f}" for size in sizes))
    peaks = {"the training step": plan.peak} | {n: needs.total for n, (needs, _) in found.items()}
    most = max(peaks, key=lambda name: peaks[name])
    lines.append(
        f"{'peak of the run':20s}{peaks[most] / GIB:.3f} of {plan.chip.memory} GiB, {most}"
    )
    return "\n".join(lines)


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


def build(c: ConfigDict, mesh: Mesh) -> program.Program:
    """The policy's step, with a policy and a reference of the shape of model.preset."""
    return program.of_policy(c, *_shapes(c, mesh), mesh, steps=c.train.steps)


def _shapes(c: ConfigDict, mesh: Mesh) -> tuple[LlamaConfig, LlamaConfig]:
    """The policy's and the reference's."""
    return _shape(c, mesh, c.model.dtype), _shape(c, mesh, c.model.ref_dtype)


def _shape(c: ConfigDict, mesh: Mesh, dtype: str) -> LlamaConfig:
    changes = {"vocab_size": c.tokenizer.vocab_size} if c.tokenizer.source == "train" else {}
    return program.computed(c, presets.get(c.model.preset, **changes), dtype, mesh)


def _explained(error: Exception, what: str, topology: str, smaller: str) -> Exception:
    """DoesNotFit where the compiler ran out of the chip's memory."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text or "hbm" not in text.lower():
        return error
    found = re.search(r"Used ([\d.]+[MGT]) of ([\d.]+G) hbm", text) or re.search(
        r"\(([\d.]+[MGT])\) exceeds available HBM \(([\d.]+G)\)", text
    )
    needs, has = found.groups() if found else ("more", "what a chip has")
    return _does_not_fit(what, topology, needs, has, smaller)


def _does_not_fit(what: str, topology: str, needs: str, has: str, smaller: str) -> DoesNotFit:
    return DoesNotFit(
        f"{what} does not fit {topology}: needs {needs}iB of {has}iB a chip; try {smaller}."
    )


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> None:
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    needs = {"topology": "name a slice, for instance v5p-64"}
    found = config_file.parse(argv, OPTIONS, required=needs)
    asked = found.config, found.topology, _compiler_options(found.xla)
    beside = compile_around(*asked)
    plan = largest_batch(*asked) if found.find_batch else compile_step(*asked)
    print(report(plan), report_around(beside, plan), sep="\n")


def _compiler_options(text: str) -> dict[str, str]:
    options = [option.partition("=") for option in text.split(",") if option]
    for name, equals, _ in options:
        if not equals:
            raise InputError(f"--xla: {name} has no value: write name=value, with commas between.")
    return {name: value for name, _, value in options}


if __name__ == "__main__":
    sys.exit(main(sys.argv))
