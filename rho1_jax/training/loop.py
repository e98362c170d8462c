"""The training loop: step, log one step late, evaluate, save, stop when asked."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from rho1_jax.slm.step import Batch, Metrics, TrainState
from rho1_jax.training.bad_steps import BadSteps, TooManyBadSteps
from rho1_jax.training.checkpoint import Checkpoints
from rho1_jax.training.interruption import Interrupted, StopSignal
from rho1_jax.training.metrics import MetricsLog

Evaluate = Callable[[Any], Mapping[str, Mapping[str, float]]]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_norm = jax.jit(optax.tree.norm)
_log = logging.getLogger("rho1_jax")


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long, and what happens between the steps.

    glance: `evaluate` on a few rows, to see whether parameters are worth saving.
    binding: what the checkpoints belong to.
    """

    steps: int
    evaluate: Evaluate
    glance: Evaluate
    eval_every: int
    checkpoints: Checkpoints
    checkpoint_every: int
    binding: dict[str, Any]
    log: MetricsLog
    bad_steps: BadSteps
    stop: StopSignal


def fit(state: TrainState, step_fn: StepFn, batches: Iterable[Batch], loop: Loop) -> TrainState:
    """Train from `state.step` to `loop.steps`; `batches` starts with the batch of state.step.

    `step_fn` may donate its state. Metrics are read one step late, so that an accelerator always
    has the next step queued. Raises Interrupted, with everything saved, when `loop.stop` says so,
    and InputError when too many steps in a row were bad.
    """
    log, steps = loop.log, loop.steps
    done = int(state.step)
    if done == 0:
        log.heldout(0, loop.evaluate(state.params))
        log.restart_clock()
    pending, saved, signum = None, done, None

    def note(step: int, metrics: Metrics, *, always: bool = False) -> None:
        loop.bad_steps.see(step, log.step(step, metrics, always=always))

    with loop.stop.defer():
        for batch in batches:
            if done == steps or (signum := loop.stop.now()) is not None:
                break
            state, metrics = step_fn(state, batch)
            done += 1
            if pending is not None:
                note(*pending)
            pending = (done, metrics)
            due = done % loop.checkpoint_every == 0 or done == loop.checkpoints.decays_after
            if done % loop.eval_every and not due and done != steps:
                continue
            note(*pending, always=True)
            pending, heldout = None, None
            if done % loop.eval_every == 0 or done == steps:
                heldout = loop.evaluate(state.params)
                log.heldout(done, heldout)
            if (due or done == steps) and _saved(done, state, loop, heldout):
                saved = done
            log.restart_clock()
        if pending is not None:
            note(*pending, always=True)
        # A second save of a step would pull the first from under its writer.
        if signum is not None:
            if saved != done and _saved(done, state, loop, None):
                saved = done
            raise Interrupted(signum, f"saved at step {saved} of {steps}")
    if saved != done:
        raise TooManyBadSteps(
            f"The training ended at step {done} with parameters that give no finite losses, and "
            f"they are not saved. {loop.bad_steps.advice}"
        )
    return state


def _saved(
    step: int, state: TrainState, loop: Loop, heldout: Mapping[str, Mapping[str, float]] | None
) -> bool:
    """Whether the state was worth saving, and is saved: older checkpoints stay beside bad ones.

    One step can make parameters of which only the next shows that they are of no use. The held-out
    loss shows it at once, but for those so large that a norm divides them by infinity: then all
    tokens are equally likely. Amid bad steps the parameters may be the cause, unless this is the
    end.
    """
    amid_bad = loop.bad_steps.in_a_row and step != loop.steps
    losses = heldout or loop.glance(state.params)
    finite = all(math.isfinite(x["loss"]) for x in losses.values())
    if amid_bad or not (finite and math.isfinite(_norm(state.params))):
        _log.warning("WARNING: step %d is not saved: its parameters give no finite losses.", step)
        return False
    loop.checkpoints.save(step, state, loop.binding)
    return True
