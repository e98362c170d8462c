"""What a chip holds in every stage of a run, not the training step alone, by the TPU's compiler.

    python -m experiments.measure.whole_runs [--only=REGEX]     # compile, a plan at a time
    python -m experiments.measure.whole_runs --only=nothing     # only the table

The cases are those of plans.py, whose CSV has the training step itself. A case's rows of
whole_runs.csv are replaced, others are kept; the table in docs/scale.md is made of them.
"""

import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from experiments.lab import tables
from experiments.measure import plans
from experiments.measure.plans import Case
from rho1_jax import command_line
from rho1_jax.training.planning import aot

STEP = "train"


def cases() -> list[Case]:
    """Plans with a reference, compiled as by default."""
    return [c for c in plans.cases() if c.rings and c.method != "CLM"]


def rows(case: Case) -> list[dict[str, Any]]:
    """One for each program around the step, in the order in which they run."""
    versions = f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}"
    found = aot.compile_around(plans.config_of(case), case.topology)
    return [
        {
            "name": case.name,
            "program": program,
            "arguments_gib": needs.arguments / aot.GIB,
            "temporaries_gib": needs.temporaries / aot.GIB,
            "beside_gib": needs.beside / aot.GIB,
            "peak_gib": needs.total / aot.GIB,
            "sent_gib": sum(t.bytes for t in traffic.values()) / aot.GIB,
            "versions": versions,
        }
        for program, (needs, traffic) in found.items()
    ]


def write(path: Path, new: list[dict[str, Any]]) -> None:
    """The CSV with these rows in the place of older ones."""
    texts = [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in new]
    places = {case.name: i for i, case in enumerate(cases())}
    tables.replace(path, texts, ["name", "program"], order=lambda r: places[r["name"]])


def table(around: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """Each run in Markdown: its step, the programs around it, and which of all takes most."""
    head = ("run", "program", "arguments", "temporaries", "beside", "peak, GiB", "sent, GiB")
    step_of = {r["name"]: r for r in steps}
    lines = []
    for name in dict.fromkeys(r["name"] for r in around):
        step = step_of[name]
        sent = sum(x for kind in plans.KINDS if (x := step[f"{kind}_gib"]) == x)  # not NaN
        own = [r for r in around if r["name"] == name]
        own.append(step | {"program": STEP, "beside_gib": 0.0, "sent_gib": sent})
        most = max(r["peak_gib"] for r in own)
        for r in own:
            sizes = [f"{r[f'{k}_gib']:.3f}" for k in ("arguments", "temporaries", "beside")]
            peak = f"{r['peak_gib']:.3f}"
            peak = f"**{peak}** of {step['memory_gib']:g}" if r["peak_gib"] == most else peak
            lines.append([name, r["program"], *sizes, peak, f"{r['sent_gib']:.3f}"])
    return tables.markdown(head, lines)


def main(argv: Sequence[str]) -> None:
    options = {"out": Path("experiments/whole_runs.csv"), "only": ""}
    found = command_line.parse(argv, options)
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    for case in cases():
        if re.search(found.only, case.name):
            write(found.out, rows(case))
            print(case.name, flush=True)
    print(table(tables.read(found.out), tables.read(found.out.with_name("plans.csv"))))


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
