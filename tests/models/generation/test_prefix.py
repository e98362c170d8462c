"""What rows have in common is read once, and changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.models import llama
from rho1_jax.models.attention import causal_attention
from rho1_jax.models.generation import generate, prefix
from rho1_jax.models.rotary import RopeScaling
from rho1_jax.training import sharding
from tests.models.generation.test_generate import PLAIN, SPECIAL, randomised

COMMON = list(range(1, 41))
ROWS = [[*COMMON, 50, 51, 52], [*COMMON, 60], [*COMMON, *range(20, 30)]]


@pytest.fixture
def reads(monkeypatch):
    """How many tokens were read for all rows, call by call."""
    found, read = [], prefix.read
    monkeypatch.setattr(prefix, "read", lambda *a: found.append(len(a[1])) or read(*a))
    return found


@pytest.mark.parametrize("config", [PLAIN, SPECIAL])
def test_hidden_states_and_keys_are_those_of_whole_rows(config):
    params = randomised(config)
    tokens = np.array([[*COMMON, 9, i, 3] for i in range(4)], np.int32)
    lengths = np.full(4, 43)
    whole, head, kept = prefix.apply_after(params, None, tokens, lengths, config=config)
    plain, _ = llama.apply(params, tokens, config=config)
    np.testing.assert_allclose(whole, plain, atol=1e-5)
    before = prefix.read(params, COMMON, config)
    after, _, kept_after = prefix.apply_after(
        params, before, tokens[:, 40:], lengths - 40, config=config
    )
    np.testing.assert_allclose(after, whole[:, 40:], atol=2e-5)
    for a, b in zip(kept_after, kept, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert head.shape == (config.vocab_size, config.width)


@pytest.mark.parametrize("config", [PLAIN, SPECIAL])
def test_generated_tokens_are_those_of_each_row_alone(config, reads):
    params = randomised(config)
    together = generate.generate(params, config, ROWS, max_new_tokens=11)
    assert reads == [32]
    alone = [generate.generate(params, config, [row], max_new_tokens=11)[0] for row in ROWS]
    assert together == alone
    assert reads == [32, 0, 0, 0]


def test_over_a_mesh(reads):
    params, config = randomised(PLAIN), dataclasses.replace(PLAIN, batch_axes=sharding.BATCH_AXES)
    alone = generate.generate(params, PLAIN, ROWS, max_new_tokens=5)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        assert generate.generate(spread, config, ROWS, max_new_tokens=5) == alone
    assert reads == [32, 32]


def test_what_is_shared():
    assert prefix.shared(ROWS, 100, PLAIN) == 32
    assert prefix.shared([[*COMMON, *COMMON], [*COMMON, *COMMON, 1]], 100, PLAIN) == 64
    assert prefix.shared([[*COMMON, *COMMON], [*COMMON, *COMMON, 1]], 63, PLAIN) == 32
    assert prefix.shared([COMMON[:31], COMMON], 100, PLAIN) == 0
    assert prefix.shared([[2, *COMMON], COMMON], 100, PLAIN) == 0
    assert prefix.shared(ROWS, -1, PLAIN) == 0
    assert prefix.shared(ROWS[:1], 100, PLAIN) == 0  # nothing would be saved
    dynamic = dataclasses.replace(PLAIN, rope_scaling=RopeScaling("dynamic", 4.0, 8))
    assert prefix.shared(ROWS, 100, dynamic) == 0


@pytest.mark.parametrize("window", [None, 5, 150])
def test_later_queries_alone(window):
    """Also over several blocks of queries, on either side of a block's edge."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 300, 4, 8))
    k, v = (jax.random.normal(key, (2, 300, 2, 8)) for key in keys[1:])
    whole = causal_attention(q, k, v, window=window)
    for n in (1, 130, 256):
        np.testing.assert_allclose(
            causal_attention(q[:, -n:], k, v, window=window), whole[:, -n:], atol=1e-5
        )
    assert not jnp.allclose(whole[:, -1], whole[:, -2])
