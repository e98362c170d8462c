"""A trace of some training steps: what device and host did when (jax.profiler)."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from rho1_jax.errors import InputError
from rho1_jax.training.loop import StepFn

_log = logging.getLogger("rho1_jax")


def steps_of(text: str) -> tuple[int, int]:
    """The first and the last step of A:B, counted from 1 as in metrics.csv."""
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(
            f"--profile={text[:40]} names no steps: give the first and the last, as 10:12."
        )
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def traced(step_fn: StepFn, steps: tuple[int, int], *, done: int, folder: Path) -> Iterator[StepFn]:
    """`step_fn`, whose calls for `steps` leave a trace in `folder`; `done` steps were before.

    The trace has begun when the first is called and ends when the last has been computed, or with
    the training.
    """
    first, last = steps
    running = False

    def stop() -> None:
        nonlocal running
        jax.profiler.stop_trace()
        running = False
        _log.info(
            "profile: steps %d to %d are traced in %s: open its perfetto_trace.json.gz at "
            "ui.perfetto.dev, or pip install xprof and run xprof --logdir=%s",
            first, done, folder, folder,
        )  # fmt: skip

    def step(state: Any, batch: Any) -> Any:
        nonlocal done, running
        if done + 1 == first:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
            running = True
        state, metrics = step_fn(state, batch)
        done += 1
        if running and done == last:
            jax.block_until_ready(metrics)
            stop()
        return state, metrics

    try:
        yield step
    finally:
        if running:
            stop()
