"""What a run is going to take, worked out before anything is read: steps, tokens, FLOPs, disk, and
memory by device. `--dry_run` prints it and ends."""

import shutil
from typing import Any

import jax

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models import llama
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.pipeline import models
from rho1_jax.pipeline.workspace import Workspace, decays_after, n_steps
from rho1_jax.slm.signals import TOP
from rho1_jax.training import checkpoint, program
from rho1_jax.training.planning import around
from rho1_jax.training.planning.around import Around
from rho1_jax.training.program import Program

SCORE_BYTES = 6  # of a token and field: a float16 and its share of checksums, rounded up


def lines(ws: Workspace, *, compiled: bool = False) -> list[str]:
    """The plan for people; compiled: with what the compiled programs reserve, which takes its time
    to compile. InputError if the disk has too little room."""
    c = ws.config
    policy, ref = models.planned(ws), models.planned_reference(ws)
    found = []
    if ws.has_reference and not c.reference.init:
        found.append(("reference", _amount(ws, "reference")))
    n = planned_steps(ws, "train")
    if ws.caches_scores:
        given = f", from {ws.given_scores}" if ws.given_scores else ""
        found.append(("score", f"at most {n * c.train.batch_size:,} rows{given}"))
    found.append(("train", _amount(ws, "train")))
    if ws.options.baseline:
        found.append(("baseline", f"{_amount(ws, 'train')}, of which every token counts"))
    total = sum(flops(ws).values())
    found.append(("FLOPs", f"{total:.3g} in all stages but evaluation"))

    built = program.of_policy(c, policy, ref, ws.mesh, steps=max(n, 1))
    needed = _disk(ws, built.state, n * c.train.batch_size if ws.caches_scores else 0)
    free = shutil.disk_usage(ws.folder).free
    found.append(("disk", f"{_size(needed)} beside the packed rows, {_size(free)} are free"))
    begun = (ws.folder / "checkpoints" / "steps").exists()  # then most of it lies there already
    if needed > free and not begun:
        raise InputError(
            f"{ws.folder} needs {_size(needed)} for scores and kept checkpoints, but its disk has "
            f"{_size(free)} free: make room, or set checkpoint.keep lower."
        )
    parts = {"parameters": built.state.params, "moments": built.state.opt_state}
    parts |= {"average": built.state.ref_ema, "reference": built.ref_params}
    sizes = {name: around.bytes_of(x) for name, x in parts.items() if x is not None}
    found += [(name, f"{_size(n)} a device") for name, n in sizes.items()]
    if compiled:
        found += _reserved(ws, built, policy, ref)
    return [f"{name:12}{value}" for name, value in found]


def _reserved(
    ws: Workspace, built: Program, policy: LlamaConfig, ref: LlamaConfig
) -> list[tuple[str, str]]:
    """What the training step and the programs around it reserve, by the compiler."""
    step = built.step.lower(built.state, built.ref_params, built.batch, ws.key)
    smaller = "train.accumulation, model.remat=full, a larger mesh.fsdp"
    programs = {"train": Around(step, 0, smaller)}
    programs |= around.programs(ws.config, policy, ref, ws.mesh)
    needs = {name: around.needs(p.lowered.compile(), p.beside) for name, p in programs.items()}
    most = max(needs, key=lambda name: needs[name].reserved)
    line = f"at most {_size(needs[most].reserved)} a device, by the program `{most}`"
    if has := _limit():
        line += f"; a device has {_size(has)}"
        if needs[most].reserved > has:
            line += f", which may be too little: try {programs[most].smaller}"
    temporaries = f"{_size(needs['train'].temporaries)} a device, of the training step"
    return [("temporaries", temporaries), ("memory", line)]


def _limit() -> int:
    """Bytes that a device lets programs use; 0 where it does not say, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def flops(ws: Workspace) -> dict[str, float]:
    """What each stage must compute at least, by name; 0 while its steps are not known."""
    c, length = ws.config, ws.config.data.seq_len
    policy, ref = models.planned(ws), models.planned_reference(ws)
    trained = planned_steps(ws, "train") * c.train.batch_size * length
    found = {"reference": 0.0, "score": 0.0}
    if ws.has_reference and not c.reference.init:
        rows = planned_steps(ws, "reference") * c.reference.batch_size
        found["reference"] = rows * length * program.flops_per_token(policy, None, length)
    if ws.caches_scores and not ws.given_scores:
        found["score"] = trained * float(llama.flops_per_token(ref, length))
    live = ref if program.scores_in_step(c) else None
    found["train"] = trained * program.flops_per_token(policy, live, length)
    plain = trained * program.flops_per_token(policy, None, length)
    return found | {"baseline": plain if ws.options.baseline else 0.0}


def resumes_at(ws: Workspace, section: str) -> int:
    """The step that the training of `reference` or `train` goes on from, 0 if it has not begun.

    InputError if it has decayed and can go on neither from there nor from before.
    """
    folder = ws.folder / {"reference": "reference", "train": "checkpoints"}[section]
    steps = planned_steps(ws, section)
    return checkpoint.resumes_at(folder, decays_after(ws.config[section], steps)) if steps else 0


def planned_steps(ws: Workspace, section: str) -> int:
    """As many as the section says; by epochs only known once the rows are packed, 0 until then."""
    settings, data = ws.config[section], ws.config.data
    domains = data.clean if section == "reference" else data.corpus
    manifests = [ws.folder / "data" / name / "manifest.json" for name in domains]
    if settings.steps or not all(path.exists() for path in manifests):
        return settings.steps
    rows = sum(jsonfile.read(path)["splits"]["train"]["rows"] for path in manifests)
    return n_steps(settings, rows)


def _amount(ws: Workspace, section: str) -> str:
    settings, steps = ws.config[section], planned_steps(ws, section)
    tokens = settings.batch_size * ws.config.data.seq_len
    if not steps:
        return f"as many steps of {tokens:,} tokens as its epochs make of the packed rows"
    done = resumes_at(ws, section)
    after = f"; goes on from step {done:,}" if 0 < done < steps else ""
    return f"{steps:,} steps of {tokens:,} tokens, {steps * tokens:,} in all{after}"


def _disk(ws: Workspace, state: Any, n_scored: int) -> int:
    """Bytes of cached scores and of the checkpoints that are kept, one more while it is saved."""
    trained = 1 + (ws.has_reference and not ws.config.reference.init) + ws.options.baseline
    before_decay = "wsd" in (ws.config.train.schedule, ws.config.reference.schedule)
    kept = ws.config.checkpoint.keep + 1 + before_decay
    checkpoints = trained * kept * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    top = ws.selection.distill_top
    n_fields = sum(top if name in TOP else 1 for name in ws.score_fields)
    return checkpoints + n_scored * ws.config.data.seq_len * SCORE_BYTES * n_fields


def _size(n: int | float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:.3g} {unit}"
        n /= 1024
    return ""
