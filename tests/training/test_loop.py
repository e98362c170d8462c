"""The training loop: what is saved when, and what is not. Steps are plain functions here."""

import contextlib
import math

import jax.numpy as jnp
import pytest

from rho1_jax.slm.step import TrainState
from rho1_jax.training import loop
from rho1_jax.training.bad_steps import BadSteps, TooManyBadSteps
from rho1_jax.training.checkpoint import Checkpoints
from rho1_jax.training.interruption import Interrupted, StopSignal
from rho1_jax.training.loop import Loop
from rho1_jax.training.metrics import MetricsLog

SIGNAL = 15


def state(step, params):
    """`params`, a number, stands for parameters, and is their loss up to 9."""
    return TrainState(jnp.int32(step), jnp.full(2, params, jnp.float32), None)


def told(state):
    return int(state.step), float(state.params[0])


class Saves(Checkpoints):
    """Keeps in memory what is saved."""

    def __init__(self):
        self.saved, self.decays_after = [], None

    def save(self, step, state, binding):  # noqa: ARG002
        self.saved.append((step, float(state.params[0])))


class Log(MetricsLog):
    def __init__(self):
        self.steps, self.heldouts = [], []

    def restart_clock(self):
        pass

    def step(self, step, sums, *, always=False):  # noqa: ARG002 (as the log that it stands for)
        self.steps.append(step)
        return {name: float(x) for name, x in sums.items()}

    def heldout(self, step, results):  # noqa: ARG002
        self.heldouts.append(step)


class Stop(StopSignal):
    """Asks to stop after that many steps; None: never."""

    def __init__(self, after=None):
        self.after, self.asked = after, -1

    def defer(self):
        return contextlib.nullcontext()

    def now(self):
        self.asked += 1
        return SIGNAL if self.asked == self.after else None


def fit(step_fn, steps=8, *, stop_after=None, most=3, start=0, **changes):
    """(state or what was raised, the saves, the log) of a training by `step_fn`."""
    saves, log = Saves(), Log()

    def losses_of(params):
        return {"web": {"loss": min(float(params[0]), 9.0)}}

    bad_steps = BadSteps("train", most, lambda step: f"rows of step {step}")
    settings = {
        "steps": steps, "evaluate": losses_of, "glance": losses_of, "eval_every": 4,
        "checkpoints": saves, "checkpoint_every": 2, "binding": {}, "log": log,
        "bad_steps": bad_steps, "stop": Stop(stop_after),
    }  # fmt: skip
    try:
        end = loop.fit(
            state(start, 0.0), step_fn, iter(range(start, steps)), Loop(**settings | changes)
        )
    except (TooManyBadSteps, Interrupted) as raised:
        end = raised
    return end, saves.saved, log


def metrics_of(*, bad):
    return {"bad": jnp.float32(bad), "empty": jnp.float32(0), "grad_norm": jnp.float32(1)}


def good(old, _batch):
    return state(old.step + 1, old.params + 1), metrics_of(bad=False)


def mad_at(first, junk=math.nan):
    """Steps after one that leaves junk are bad, and change nothing."""

    def step_fn(old, batch):
        if old.step + 1 < first:
            return good(old, batch)
        return state(old.step + 1, junk), metrics_of(bad=old.step >= first)

    return step_fn


def test_saves_evaluates_and_logs_when_due():
    end, saved, log = fit(good, steps=9)
    assert told(end) == (9, 9.0)
    assert saved == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0), (9, 9.0)]
    assert log.heldouts == [0, 4, 8, 9]
    assert log.steps == list(range(1, 10))


def test_goes_on_where_the_state_is():
    end, saved, log = fit(good, start=5)
    assert end.step == 8
    assert [step for step, _ in saved] == [6, 8]
    assert log.heldouts == [8]


@pytest.mark.parametrize("junk", [math.nan, 1e30])
@pytest.mark.parametrize("first", [2, 3, 4])
def test_parameters_that_one_step_spoilt_are_not_saved(first, junk):
    """Not even where no later step has shown it yet, and the held-out loss does not."""
    end, saved, _ = fit(mad_at(first, junk))
    assert isinstance(end, TooManyBadSteps)
    assert "3 steps in a row" in str(end)
    assert [step for step, _ in saved] == [step for step in (2, 4) if step < first]


@pytest.mark.parametrize("first", [6, 7, 8])
def test_spoilt_parameters_at_the_end_are_not_saved(first):
    end, saved, _ = fit(mad_at(first))
    assert isinstance(end, TooManyBadSteps)
    assert "lower train.lr" in str(end)
    assert saved[-1][0] < first


def test_a_bad_last_step_ends_a_run_well():
    """It changed nothing, and the parameters before it are of use."""

    def bad_last(old, batch):
        if old.step == 7:
            return old._replace(step=jnp.int32(8)), metrics_of(bad=True)
        return good(old, batch)

    end, saved, _ = fit(bad_last)
    assert told(end) == (8, 7.0)
    assert saved[-1] == (8, 7.0)


def test_a_signal_saves_and_says_where():
    end, saved, _ = fit(good, stop_after=3)
    assert (end.signum, end.saved) == (SIGNAL, "saved at step 3 of 8")
    assert saved == [(2, 2.0), (3, 3.0)]


def test_a_signal_after_a_save_does_not_save_twice():
    end, saved, _ = fit(good, stop_after=4)
    assert end.saved == "saved at step 4 of 8"
    assert saved == [(2, 2.0), (4, 4.0)]


@pytest.mark.parametrize("first", [2, 3])
def test_a_signal_amid_bad_steps_keeps_the_last_good_checkpoint(first):
    end, saved, _ = fit(mad_at(first), stop_after=3)
    good_step = 0 if first == 2 else 2
    assert end.saved == f"saved at step {good_step} of 8"
    assert [step for step, _ in saved] == [2] * (first == 3)
