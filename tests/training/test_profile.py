"""A trace of the steps that were asked for, and of no others."""

import gzip
import logging

import jax
import jax.numpy as jnp
import pytest

from rho1_jax.errors import InputError
from rho1_jax.training import profile


@pytest.fixture
def trained(tmp_path, caplog):
    """Trains five steps after `done`, counting them in the trace; what was traced, what said."""
    caplog.set_level(logging.INFO, "rho1_jax")

    def run(steps, done):
        def step_fn(state, _):
            with jax.profiler.TraceAnnotation(f"number{state}"):
                return state + 1, {"loss": jnp.ones(())}

        with profile.traced(step_fn, steps, done=done, folder=tmp_path) as step:
            state = done + 1
            for _ in range(5):
                state, _ = step(state, None)
        files = tmp_path.rglob("perfetto_trace.json.gz")
        trace = b"".join(gzip.decompress(path.read_bytes()) for path in files)
        return [i for i in range(1, 11) if b'"number%d"' % i in trace], caplog.text

    return run


@pytest.mark.parametrize(
    ("steps", "done", "found", "said"),
    [((2, 3), 0, [2, 3], "steps 2 to 3"), ((9, 12), 5, [9, 10], "9 to 10"), ((2, 3), 5, [], "")],
    ids=["in the middle", "the training ends first", "done before"],
)
def test_those_steps_are_traced(steps, done, found, said, trained, tmp_path):
    numbers, text = trained(steps, done)
    assert numbers == found
    assert (said in text) if said else not text
    assert str(tmp_path) in text or not said


@pytest.mark.parametrize("text", ["3", "0:2", "4:3", "a:b", "-1:2", "1:2:3", ":", "9" * 5000])
def test_what_names_no_steps_is_one_sentence(text):
    with pytest.raises(InputError, match="names no steps") as raised:
        profile.steps_of(text)
    assert len(str(raised.value)) < 200


def test_steps_are_those_of_metrics_csv():
    assert profile.steps_of("10:12") == (10, 12)
