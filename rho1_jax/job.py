"""One training run inside a Run: the reference's or the policy's, from its newest checkpoint on."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax.data import loader
from rho1_jax.errors import InputError
from rho1_jax.run import Model, Run, Scores, n_steps, weights
from rho1_jax.slm import step
from rho1_jax.slm.selection import Selection
from rho1_jax.training import checkpoint, hosts, program, sharding
from rho1_jax.training.checkpoint import Checkpoints
from rho1_jax.training.loop import fit
from rho1_jax.training.metrics import MetricsLog, measured_peak


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: of what, on what, selecting how, and where to put it."""

    name: str
    folder: Path  # the model folder
    log_folder: Path
    settings: ConfigDict  # `reference` or `train` of the config
    domains: ConfigDict  # data.clean or data.corpus
    selection: Selection = Selection("all", 1.0)
    live_reference: Model | None = None
    cached: Scores | None = None
    decay: float = 1.0  # below 1 the live reference (or, without one, the start) follows the policy
    binding: Mapping[str, str] = dataclasses.field(default_factory=dict)


def train(run: Run, job: Job) -> bool:
    """Train the initial model, resuming from the newest checkpoint in the job's folder.

    False if there was nothing left to do.
    """
    c, t = run.config, job.settings
    rows = run.train_rows(job.domains)
    steps = n_steps(t, rows)
    fingerprints = {name: r.fingerprint for name, r in rows.items()}
    binding = {**job.binding, "rows": config_lib.digest(fingerprints)}
    sharding.require_divisible(t.batch_size, t.accumulation, run.mesh, job.name)

    learning_rate, tx = program.optimizer_of(t, steps)
    with Checkpoints(job.folder, keep=c.checkpoint.keep) as checkpoints:
        if checkpoints.latest is not None:
            checkpoints.require_binding(binding)
        if (checkpoints.latest or 0) >= steps:
            say(job.name, f"finished at step {checkpoints.latest}, skipped")
            return False
        params, shape = run.initial_model()
        if hosts.first():
            checkpoint.write_model_file(job.folder, shape, run.tokenizer)
        ref_params, ref_shape = job.live_reference or (None, shape)
        average = None
        if job.decay < 1.0:
            average, ref_params = _average_of(ref_params, params), None
        state, shardings = _start(run, job, checkpoints, params, tx, average)
        del params, average  # the state has them; a second copy of a large model would not fit
        first = int(state.step)

        jitted = program.train_step(
            t,
            shape,
            ref_shape,
            dataclasses.replace(job.selection, steps=steps),
            tx,
            shardings,
            c.loss_chunk_tokens,
            job.decay,
        )
        batches = loader.train_batches(
            rows,
            weights(job.domains),
            batch_size=t.batch_size,
            seed=c.seed,
            start_step=first,
            num_steps=steps,
            scores=job.cached,
            **run.parts,
        )
        live = job.live_reference or job.decay < 1.0
        open_log = functools.partial(
            MetricsLog,
            name=job.name,
            first_step=first,
            steps=steps,
            learning_rate=learning_rate,
            flops_per_token=program.flops_per_token(
                shape, ref_shape if live else None, c.data.seq_len
            ),
            peak_flops=measured_peak(c.model.dtype),
            every=c.log_every,
        )
        with hosts.log_folder(job.log_folder) as log_folder, open_log(log_folder) as log:
            fit(
                state,
                lambda state, batch: jitted(state, ref_params, batch, run.key),
                log.timed(map(run.put, batches)),
                steps=steps,
                evaluate=run.heldout_fn(shape),
                eval_every=c.eval.every,
                checkpoints=checkpoints,
                checkpoint_every=c.checkpoint.every,
                binding=binding,
                log=log,
                stop=run.stop,
            )
    return True


def _average_of(reference: Any, params: Any) -> Any:
    """What a reference that follows the policy starts from: the reference, else the policy."""
    if reference is None:
        return params
    ours, theirs = (jax.tree.map(jax.numpy.shape, tree) for tree in (params, reference))
    if ours != theirs:
        raise InputError(
            "select.average_of=reference averages reference and policy, but their shapes differ: "
            "use a reference of the policy's shape, or select.average_of=policy."
        )
    return jax.tree.map(lambda r, p: r.astype(p.dtype), reference, params)


def _start(run, job, checkpoints, params, tx, average) -> tuple[step.TrainState, step.TrainState]:
    """The state to go on from, new or restored, and its shardings."""

    def new_state(params, average):
        return step.init_state(params, tx, average)

    abstract = jax.eval_shape(new_state, params, average)
    shardings = sharding.state_shardings(abstract, tx, run.mesh)
    if checkpoints.latest is None:
        return jax.jit(new_state, out_shardings=shardings)(params, average), shardings
    state = checkpoints.restore(sharding.placed(abstract, shardings))
    say(job.name, f"resumes at step {int(state.step)}")
    return state, shardings


def say(stage: str, message: str) -> None:
    """One line about a stage."""
    print(f"{stage}: {message}", flush=True)
