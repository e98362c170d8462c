"""The training loop: step, log one step late, evaluate, save, stop when asked."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rho1_jax.slm.step import Batch, Metrics, TrainState
from rho1_jax.training.checkpoint import Checkpoints
from rho1_jax.training.interruption import Interrupted, StopSignal
from rho1_jax.training.metrics import MetricsLog

Evaluate = Callable[[Any], Mapping[str, Mapping[str, float]]]


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterable[Batch],
    *,
    steps: int,
    evaluate: Evaluate,
    eval_every: int,
    checkpoints: Checkpoints,
    checkpoint_every: int,
    binding: dict[str, Any],
    log: MetricsLog,
    stop: StopSignal,
) -> TrainState:
    """Train from `state.step` to `steps`; `batches` starts with the batch of state.step.

    `step_fn` may donate its state. Metrics are read one step late, so that an accelerator always
    has the next step queued. Raises Interrupted, with everything saved, when `stop` says so.
    """
    done = int(state.step)
    if done == 0:
        log.heldout(0, evaluate(state.params))
        log.restart_clock()
    pending, saved, signum = None, done, None
    with stop.defer():
        for batch in batches:
            if done == steps or (signum := stop.now()) is not None:
                break
            state, metrics = step_fn(state, batch)
            done += 1
            if pending is not None:
                log.step(*pending)
            pending = (done, metrics)
            if done % eval_every and done % checkpoint_every and done != steps:
                continue
            log.step(*pending, always=True)
            pending = None
            if done % eval_every == 0 or done == steps:
                log.heldout(done, evaluate(state.params))
            if done % checkpoint_every == 0 or done == steps:
                checkpoints.save(done, state, binding)
                saved = done
            log.restart_clock()
        if pending is not None:
            log.step(*pending, always=True)
        if signum is not None:
            if saved != done:  # a second save of a step would pull the first from under its writer
                checkpoints.save(done, state, binding)
            raise Interrupted(signum, f"saved at step {done} of {steps}")
    return state
