"""A parameter tree from the matrices of somebody's file, one by one, straight into its shards."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from rho1_jax.models import llama
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.llama import Params

# A parameter's name and its layer (None outside the layers) -> what reads a part of it, laid out as
# in llama.py, as float32.
Find = Callable[[str, int | None], Callable[[Any], np.ndarray]]  # of a tuple of slices
# Parameter shapes -> a sharding for each.
Place = Callable[[Any], Any]


def shapes(config: Architecture) -> Params:
    """The parameter tree of a decoder, shapes instead of arrays."""
    return jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))


def stored_shapes(config: Architecture) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """Name, layer (None outside) and shape of every matrix as files have it: layers' transposed."""
    tree = shapes(config)
    layers = tree.pop("layers")
    yield "embed", None, tree.pop("embed").shape
    for i in range(config.n_layers):
        for name, x in layers.items():
            yield name, i, x.shape[:0:-1]
    for name, x in tree.items():
        yield name, None, x.shape


def on_first_device(tree: Any) -> Any:
    """The Place of whoever has no mesh."""
    here = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: here, tree)


def assemble(config: Architecture, find: Find, place: Place = on_first_device) -> Params:
    """The float32 parameters, one stored matrix after the other.

    Beside the sharded result the host holds one of them at a time, and only the parts of it that
    its own devices need.
    """
    abstract = shapes(config)

    def build(path, like, sharding) -> jax.Array:
        name = path[-1].key
        if path[0].key != "layers":
            return jax.make_array_from_callback(like.shape, sharding, find(name, None))
        zeros, put = _programs(like.shape, sharding)
        stack = zeros()
        for i in range(config.n_layers):
            layer = jax.make_array_from_callback(
                like.shape[1:], _of_a_layer(sharding), find(name, i)
            )
            stack = put(stack, layer, i).block_until_ready()  # or the next would be read meanwhile
        return stack

    return jax.tree_util.tree_map_with_path(build, abstract, place(abstract))


@functools.lru_cache
def _programs(shape: tuple[int, ...], sharding: Sharding) -> tuple[Callable, Callable]:
    """An empty stack, and a stack with one layer put into its place: compiled once per shape."""

    def put(stack, layer, i):
        return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)

    return (
        jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding),
        jax.jit(put, donate_argnums=0, out_shardings=sharding),
    )


def _of_a_layer(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stack, whose first axis is never split."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding
