"""Stage 4: the policy in checkpoints/, with metrics.csv and heldout.csv beside it.

`fit` is one training inside a run, from its newest checkpoint on: the policy's, and the reference's
in the stage before.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rho1_jax import jsonfile
from rho1_jax.data import loader
from rho1_jax.errors import InputError
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.pipeline import claim, models, plan
from rho1_jax.pipeline.models import Model
from rho1_jax.pipeline.workspace import Scores, Workspace, decays_after, mixture, n_steps, say, warn
from rho1_jax.slm import step
from rho1_jax.slm.selection import require_keeps_some
from rho1_jax.slm.step import TrainState
from rho1_jax.training import checkpoint, hosts, loop, profile, program, sharding
from rho1_jax.training.bad_steps import BadSteps, TooManyBadSteps
from rho1_jax.training.checkpoint import Checkpoints
from rho1_jax.training.metrics import MetricsLog, measured_peak
from rho1_jax.training.program import Program

MENDS = ("lr", "clip", "spike")  # keys whose other value may end what made steps bad


@dataclasses.dataclass(frozen=True)
class Training:
    """Of what, on what, and where to put it."""

    section: str  # of the config: `reference` or `train`
    name: str  # as it is said
    folder: Path  # the model folder
    log_folder: Path
    domains: ConfigDict  # data.clean or data.corpus
    program: Callable[[LlamaConfig, int], Program]  # of a shape and a number of steps
    later_flops: float = 0.0  # of what follows
    reference: Callable[[], Model] | None = None  # that runs in every step, or ref_ema starts from
    scores: Callable[[], Scores | None] = lambda: None  # cached ones
    binding: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check(ws: Workspace) -> None:
    """InputError if the batches do not fit the devices, or the model not the backward pass."""
    c, t = ws.config, ws.config.train
    sharding.require_divisible(t.batch_size, t.accumulation, ws.mesh, "train")
    sharding.require_even_cut(c.data.seq_len, ws.mesh)
    program.require_blocks(t.backward_rows_top, models.planned(ws).n_layers)
    asked, last = ws.options.profile, plan.planned_steps(ws, "train")
    if asked and last and asked[1] > last:
        raise InputError(f"--profile={asked[0]}:{asked[1]}: the training has {last} steps only.")
    require_keeps_some(ws.selection, t.batch_size, c.data.seq_len, t.accumulation)
    plan.resumes_at(ws, "train")


def run(ws: Workspace) -> None:
    """Trains the policy on the tokens that the selection keeps."""
    ws.train_rows(ws.config.data.corpus)  # what is missing first is named first
    fit(ws, of_policy(ws))


def of_policy(ws: Workspace) -> Training:
    in_step = ws.has_reference and program.scores_in_step(ws.config)
    return Training(
        "train",
        f"{ws.label}train",
        ws.folder / "checkpoints",
        ws.folder,
        ws.config.data.corpus,
        functools.partial(_policy_program, ws),
        reference=functools.partial(models.reference, ws) if in_step else None,
        later_flops=plan.flops(ws)["baseline"],
        scores=ws.cached_scores,
        binding={"reference": ws.reference_digest} if ws.reference_digest else {},
    )


def of_reference(ws: Workspace) -> Training:
    folder = ws.folder / "reference"

    def built(shape: LlamaConfig, steps: int) -> Program:
        return program.of_reference(ws.config, shape, ws.mesh, steps=steps)

    flops = plan.flops(ws)
    later = flops["score"] + flops["train"] + flops["baseline"]
    return Training("reference", "reference", folder, folder, ws.config.data.clean, built, later)


def _policy_program(ws: Workspace, shape: LlamaConfig, steps: int) -> Program:
    reference = models.reference_shape(ws) if ws.has_reference else shape
    return program.of_policy(ws.config, shape, reference, ws.mesh, steps=steps)


def fit(ws: Workspace, training: Training) -> None:
    """Train the initial model, or go on from the newest checkpoint in the training's folder.

    After TooManyBadSteps it goes on with whatever values the keys in MENDS have then.
    """
    try:
        _fit(ws, training)
    except TooManyBadSteps:
        hosts.once(functools.partial(claim.release, ws.folder, training.section, MENDS))
        raise


def _fit(ws: Workspace, training: Training) -> None:
    c, t, name = ws.config, ws.config[training.section], training.name
    rows = ws.train_rows(training.domains)
    steps = n_steps(t, sum(map(len, rows.values())))
    fingerprints = {name: r.fingerprint for name, r in rows.items()}
    binding = {**training.binding, "rows": jsonfile.digest(fingerprints)}

    kept = {"keep": c.checkpoint.keep, "decays_after": decays_after(t, steps)}
    with Checkpoints(training.folder, **kept) as checkpoints:
        if checkpoints.latest is not None:
            checkpoints.leave_decayed()
            checkpoints.require_binding(binding)
        finished = (checkpoints.latest or 0) >= steps
        if hosts.first() and not (finished and checkpoint.is_described(training.folder)):
            checkpoint.write_model_file(training.folder, models.initial_shape(ws), ws.tokenizer)
        if finished:
            return say(name, f"finished at step {checkpoints.latest}, skipped")
        scores = training.scores()
        shape = models.initial_shape(ws)
        built = training.program(shape, steps)
        state, ref_params = _start(ws, training, checkpoints, built)
        first = int(state.step)
        mixed = mixture(c, training.section, steps)
        domains = [domain.name for domain in built.method.selection.domains]
        batches = loader.train_batches(
            rows,
            **mixed,
            start_step=first,
            num_steps=steps,
            scores=scores,
            numbered=domains,
            **ws.parts,
        )

        def rows_of(step: int) -> str:
            found = loader.rows_of_step(rows, **mixed, step=step - 1)
            return "; ".join(f"rows {ids} of {domain}" for domain, ids in found.items())

        open_log = functools.partial(
            MetricsLog,
            name=name,
            first_step=first,
            steps=steps,
            domains=domains,
            flops_per_token=built.flops_per_token,
            peak_flops=measured_peak(c.model.dtype),
            every=c.log_every,
            later_flops=training.later_flops,
        )

        def step_fn(state: TrainState, batch: step.Batch) -> tuple[TrainState, step.Metrics]:
            return built.step(state, ref_params, batch, ws.key)

        with (
            hosts.log_folder(training.log_folder) as log_folder,
            open_log(log_folder) as log,
            _traced(ws, training, step_fn, first) as watched,
        ):
            loop.fit(
                state,
                watched,
                log.timed(map(ws.put, batches)),
                loop.Loop(
                    steps=steps,
                    evaluate=models.heldout_fn(ws, shape),
                    glance=models.heldout_fn(ws, shape, max_rows=c.score.batch_size),
                    eval_every=c.eval.every,
                    checkpoints=checkpoints,
                    checkpoint_every=c.checkpoint.every,
                    binding=binding,
                    log=log,
                    bad_steps=BadSteps(name, t.most_bad_steps, rows_of),
                    stop=ws.stop,
                ),
            )
    return None


def _traced(
    ws: Workspace, training: Training, step_fn: loop.StepFn, done: int
) -> contextlib.AbstractContextManager[loop.StepFn]:
    """The step, of which the first host traces what --profile asks for in the policy's training."""
    asked = ws.options.profile
    if asked is None or training.section != "train" or not hosts.first():
        return contextlib.nullcontext(step_fn)
    if done >= asked[0]:
        warn(training.name, f"step {asked[0]} is done already: --profile traces nothing")
    return profile.traced(step_fn, asked, done=done, folder=ws.folder / "profile")


def _start(
    ws: Workspace, training: Training, checkpoints: Checkpoints, built: Program
) -> tuple[TrainState, Any]:
    """The state to go on from, new or restored, and the parameters of a reference in every step.

    A restored state holds all there is: no initial model is loaded beside it.
    """
    averaged = built.state.ref_ema is not None
    reference = None
    if training.reference and (checkpoints.latest is None or not averaged):
        reference, _ = training.reference()
    if checkpoints.latest is not None:
        state = checkpoints.restore(built.state)
        say(training.name, f"resumes at step {int(state.step)}")
        return state, reference

    params, _ = models.initial(ws)
    ref_ema = None
    if averaged:
        ref_ema, reference = _first_average(reference, params), None
    return program.start(built)(params, ref_ema=ref_ema), reference


def _first_average(reference: Any, params: Any) -> Any:
    """What a reference that follows the policy starts from: the reference, else the policy."""
    if reference is None:
        return params
    models.require_reference_shape(params, reference)
    return jax.tree.map(lambda r, p: r.astype(p.dtype), reference, params)
