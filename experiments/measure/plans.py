"""Which slice trains which model, by the TPU's compiler: memory, time and traffic of a step.

    python -m experiments.measure.plans [--only=REGEX]      # compile, a row at a time
    python -m experiments.measure.plans --only=nothing      # only the tables and the figure

Every case compiles the training step of planning/aot.py, in minutes and without a TPU. Its row of
plans.csv is replaced, others are kept; the tables in docs/scale.md and the figure are made of them.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.lab import tables
from rho1_jax import command_line
from rho1_jax.config import default_config, source
from rho1_jax.training.planning import aot, cost

OUT = Path("experiments/plans.csv")
METHODS = {
    "CLM": {"select.score": "all"},
    "SLM live": {"score.cached": False},
    "SLM cached": {},
}
# Products of a sharded matrix as rings of small products that overlap with their own traffic are
# XLA's default on TPUs; with them off it gathers whole matrices first.
NO_RINGS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
}
COMPARED = ("v5e-16", "v5p-64")  # slices on which MaxText was compiled, too
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice. rows: of seq_len targets, for each part that the batch is split in;
    sequence: devices that each row is cut over."""

    preset: str
    topology: str
    fsdp: int
    tensor: int
    rows: int
    seq_len: int
    method: str
    rings: bool = True
    sequence: int = 1

    @property
    def name(self) -> str:
        cut = f" over {self.sequence}" if self.sequence > 1 else ""
        rings = "" if self.rings else " without rings"
        return f"{self.preset} {self.topology} {self.seq_len}{cut} {self.method}{rings}"


def cases() -> list[Case]:
    """The plans, the comparison, and one model on slices of growing size."""
    plans = [
        ("tiny", "v5e-4", 4, 1, 8, 256),
        ("tinyllama-1.1b", "v5e-16", 16, 1, 4, 2048),
        ("mistral-7b", "v5p-64", 32, 1, 2, 4096),
        ("llama-3-70b", "v5p-256", 128, 1, 1, 8192),
        ("mistral-large-123b", "v5p-2048", 128, 8, 2, 4096),
        ("llama-3-405b", "v5p-4096", 256, 8, 1, 8192),
    ]
    out = [Case(*plan, method) for plan in plans for method in METHODS]
    long_rows = [
        ("mistral-7b", "v5p-64", 8, 1, 1, 32_768),
        ("llama-3-70b", "v5p-256", 32, 1, 1, 32_768),
    ]
    out += [Case(*plan, method, sequence=4) for plan in long_rows for method in METHODS]
    out += [Case(*plan, method, False) for plan in plans[1:3] for method in METHODS]
    return [*out, *scaling()]


def scaling() -> list[Case]:
    """One model and one batch per chip on slices of growing size."""
    sizes = (1, 16, 64, 256, 1024)
    return [
        Case("tinyllama-1.1b", f"v5p-{2 * n}", n, 1, 4, 2048, "SLM cached", False) for n in sizes
    ]


def config_of(case: Case) -> ConfigDict:
    """As configs/math.py trains the paper's models, the mesh and the batch the case's."""
    c = default_config()
    c.model.update(preset=case.preset, dtype="bfloat16", ref_dtype="bfloat16", remat="full")
    c.tokenizer.source = "init"
    c.data.update(seq_len=case.seq_len, separate_documents=False)
    c.data.corpus.corpus = c.data.clean.clean = source("files:corpus/*")
    c.mesh.update(data=1, fsdp=case.fsdp, sequence=case.sequence, tensor=case.tensor)
    c.train.update(batch_size=case.rows * case.fsdp, steps=10_000)
    c.reference.batch_size = c.score.batch_size = c.train.batch_size
    c.loss_chunk_tokens = 4096 * case.fsdp * case.sequence
    c.update_from_flattened_dict(METHODS[case.method])
    return c


def row(case: Case) -> dict[str, object]:
    """What the compiler says of a case; only `does_not_fit` where it says no."""
    facts: dict[str, object] = {"name": case.name, **dataclasses.asdict(case)}
    facts["versions"] = f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}"
    try:
        p = aot.compile_step(config_of(case), case.topology, {} if case.rings else NO_RINGS)
    except aot.DoesNotFit as error:
        return facts | {"does_not_fit": str(error)}
    facts |= {
        "chips": p.n_chips,
        "batch": p.batch_size,
        "arguments_gib": p.arguments / aot.GIB,
        "temporaries_gib": p.temporaries / aot.GIB,
        "peak_gib": p.peak / aot.GIB,
        "memory_gib": p.chip.memory,
        "flops_per_chip": p.flops / p.n_chips,
        "kernel_flops_per_chip": p.kernel_flops / p.n_chips,
        "mega_cycles": p.program.cycles / 1e6,
        "seconds": p.seconds,
        "link_seconds": p.link_seconds,
        "mfu": p.mfu,
        "tokens_per_day": p.tokens / p.seconds * 86_400,
        "endless_loops": p.program.endless,
        "without_estimate": p.program.unknown,
        "compile_seconds": p.compile_seconds,
    }
    return facts | traffic_columns(p.program)


def traffic_columns(program: cost.Program) -> dict[str, object]:
    """Runs and GiB of each kind of collective."""
    out: dict[str, object] = {}
    for kind, traffic in program.traffic.items():
        out |= {f"{kind}_runs": traffic.runs, f"{kind}_gib": traffic.bytes / aot.GIB}
    return out


def write(path: Path, new: dict[str, object]) -> None:
    """The CSV with this row in the place of an older one of its name."""
    text = {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in new.items()}
    places = {case.name: i for i, case in enumerate(cases())}
    tables.replace(path, [text], ["name"], order=lambda r: places.get(r["name"], len(places)))


def table(rows: list[dict[str, Any]]) -> str:
    """The plans in Markdown: the slice, a step, a day."""
    head = ("model", "slice", "mesh fsdp x sequence x tensor", "rows x targets", "method",
            "peak of HBM, GiB", "step, s", "links, s", "MFU", "tokens a day")  # fmt: skip
    lines = []
    for r in rows:
        mesh = f"{r['fsdp']:g} x {r['sequence']:g} x {r['tensor']:g}"
        batch = f"{r['rows'] * r['fsdp']:g} x {r['seq_len']:g}"
        found = [r.get("does_not_fit"), "", "", "", ""]
        if not isinstance(found[0], str):
            found = [f"{r['peak_gib']:.1f} of {r['memory_gib']:.1f}", f"{r['seconds']:.2f}",
                     f"{r['link_seconds']:.2f}", f"{r['mfu']:.0%}",
                     f"{r['tokens_per_day']:.2e}"]  # fmt: skip
        lines.append([r["preset"], r["topology"], mesh, batch, r["method"], *found])
    return tables.markdown(head, lines)


def comparison(rows: list[dict[str, Any]]) -> str:
    """Cycles, temporaries and traffic of a step in Markdown, whoever made it."""
    head = ("step", "cycles, millions", "temporaries, GiB", "sent by a chip, GiB", "compiler")
    lines = []
    for r in rows:
        sent = np.nansum([r.get(f"{kind}_gib", math.nan) for kind in KINDS])
        cells = [f"{r['mega_cycles']:.1f}", f"{r['temporaries_gib']:.3f}", f"{sent:.2f}"]
        lines.append([r["name"], *cells, r["versions"]])
    return tables.markdown(head, lines)


def summary(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The plans, and the comparison."""
    ours = [r for r in rows if r["rings"] is True]
    whole = [r for r in rows if not r["sequence"] > 1]  # of MaxText's there is none
    return table(ours), comparison([r for r in whole if r["topology"] in COMPARED])


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Weak scaling: a step's time and traffic per chip over chips, the batch per chip fixed."""
    import matplotlib.pyplot as plt

    chips = [int(r["chips"]) for r in rows]
    fig, (times, traffic) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    times.plot(chips, [r["seconds"] for r in rows], "o-", color="#0072B2")
    times.plot(chips, [r["link_seconds"] for r in rows], "s--", color="#D55E00")
    times.legend(["computation (estimate)", "collectives on the links"], loc="center right")
    times.set(xlabel="chips (v5p)", ylabel="seconds a step", ylim=(0, None), title="time")
    colours = ["#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00"]
    for kind, colour in zip(KINDS, colours, strict=True):
        sent = [r.get(f"{kind}_gib", math.nan) for r in rows]  # none: no point in the figure
        if not all(map(math.isnan, sent)):
            traffic.plot(chips, sent, "o-", color=colour, label=kind)
    traffic.set(xlabel="chips (v5p)", ylabel="GiB a chip sends in a step", title="collectives")
    traffic.set_yscale("log")
    traffic.legend()
    for axes in (times, traffic):
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, map(str, chips))
        axes.set_xlim(chips[0] / 1.4, chips[-1] * 1.4)
        axes.grid(alpha=0.3)
    fig.savefig(path, dpi=150)


def main(argv: Sequence[str]) -> None:
    found = command_line.parse(argv, {"out": OUT, "only": ""})
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    for case in cases():
        if re.search(found.only, case.name):
            facts = row(case)
            write(found.out, facts)
            print(facts, flush=True)
    rows = tables.read(found.out)
    print(*summary(rows), sep="\n")
    names = {case.name for case in scaling()}
    if scaled := [r for r in rows if r["name"] in names]:
        figure(scaled, found.out.with_name("weak_scaling.png"))


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
