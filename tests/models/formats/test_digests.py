"""Digests see every bit, move nothing between devices, and name what is not finite."""

import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rho1_jax.models.formats import digests
from rho1_jax.training import sharding


def test_the_value_is_that_of_runs_begun_earlier():
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    bits = x.view(np.uint32).reshape(-1)
    weights = np.arange(bits.size, dtype=np.uint32) * np.uint32(2654435762) + np.uint32(1)
    mixed = (bits ^ (bits >> 15)) * weights
    checksum = int((mixed ^ (mixed >> 13)).sum(dtype=np.uint32))
    expected = hashlib.sha256(f"['a'] (3, 5, 7) float32 {checksum};".encode()).hexdigest()
    assert digests.fingerprint({"a": x}) == expected


def test_every_bit_and_order_count():
    x = jax.random.normal(jax.random.key(0), (4, 5))
    same = digests.fingerprint({"a": x})
    assert same == digests.fingerprint({"a": np.asarray(x)})
    others = [x.at[2, 3].multiply(1 + 1e-7), x[::-1], x.reshape(5, 4), x.astype(jnp.bfloat16)]
    assert len({same, *(digests.fingerprint({"a": y}) for y in others)}) == 5
    assert same != digests.fingerprint({"b": x})


def test_whole_numbers_keep_all_their_bits():
    a, b = (digests.fingerprint({"count": jnp.int32(2**25 + i)}) for i in (0, 1))
    assert a != b  # float32 has one number for both


def test_positions_beyond_32_bits():
    shape = (3, 2**31)
    positions = functools.partial(digests._positions, shape, PartitionSpec())
    last = jax.jit(lambda: jax.lax.slice(positions(), (2, 5), (3, 6)))
    assert int(last()[0, 0]) == (2 * 2**31 + 5) % 2**32


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "fsdp"), (None, ("fsdp", "tensor"))])
@pytest.mark.parametrize("shape", [(256, 512), (2**17, 2**16)])
def test_arrays_stay_where_they_are(spec, shape):
    """No device gets another's shard, nor memory for more than its own; also of 2**33 elements."""
    mesh = sharding.make_mesh(1, 4, 2)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    compiled = digests.program(x.sharding).lower(x).compile()
    text = compiled.as_text()
    assert re.findall(r"(all-[a-z]+|collective-permute)(?:-start)?\(", text) == ["all-reduce"]
    assert re.search(r"u32\[2\]\S* all-reduce\(", text)  # of the two sums alone
    shard = 4 * np.prod(x.sharding.shard_shape(shape))
    assert compiled.memory_analysis().temp_size_in_bytes <= min(shard, 2**12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_of_parts_the_sums_are_those_of_the_whole(dtype):
    """However an array is cut, and whatever mesh is set; a NaN in one part is seen."""
    x = (jax.random.normal(jax.random.key(0), (16, 24, 8)) * 100).astype(dtype)
    mesh = sharding.make_mesh(1, 4, 2)
    expected = digests.fingerprint({"a": np.asarray(x)})
    for spec in [(), ("tensor",), (None, "fsdp"), (None, ("fsdp", "tensor")), ("fsdp", "tensor")]:
        laid = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert digests.fingerprint({"a": laid}) == expected
        with jax.set_mesh(sharding.make_mesh(2, 4, 1)):
            assert digests.fingerprint({"a": laid}) == expected
        if dtype != "int32":
            bad = {"a": laid.at[13, 20, 5].set(jnp.nan)}
            assert digests.look({"": bad})[""].not_finite == ("['a']",)


def test_all_leaves_are_one_wait(monkeypatch):
    waits = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: waits.append(1) or get(x))
    digests.look({"params": {"a": jnp.ones(3), "b": jnp.ones((2, 2))}, "step": jnp.int32(1)})
    assert len(waits) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(bad):
    tree = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2)).at[1, 0].set(bad)}, "n": jnp.int32(3)}
    assert digests.look({"params": tree})["params"].not_finite == ("['b']['c']",)


def test_files_by_samples(tmp_path):
    of = functools.partial(digests.of_files, [tmp_path / "b", tmp_path / "a"])
    (tmp_path / "a").write_bytes(b"small")
    with (tmp_path / "b").open("wb") as stream:
        stream.truncate(10**8)  # a sparse file
    first = of()
    assert first == digests.of_files([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_bytes(b"smell")
    second = of()
    with (tmp_path / "b").open("r+b") as stream:
        stream.seek(10**8 - 1)
        stream.write(b"x")
    assert len({first, second, of()}) == 3


def test_simulated_devices_run_one_program_at_a_time(monkeypatch):
    """With a dozen of them begun at once two hosts of two devices each came to a standstill."""
    seen = []

    class Result:
        def __init__(self, n):
            self.n = n
            seen.append(("begun", n))

        def block_until_ready(self):
            seen.append(("ended", self.n))
            return self

    numbers = iter(range(3))
    monkeypatch.setattr(digests, "program", lambda _: lambda _: Result(next(numbers)))
    monkeypatch.setattr(jax, "device_get", lambda sums: [np.zeros(2, np.uint32) for _ in sums])
    digests.look({"": [jnp.ones(2)] * 3})
    assert seen == [(what, n) for n in range(3) for what in ("begun", "ended")]
