"""The device's half of generation: read the prompts, then a few tokens at a time.

Prompts are padded on the right to P tokens, where no real token sees them, and go through the
decoder as in training, their common prefix once (prefix.py). Their keys and values are the first P
slots of the cache; the i-th new token of every row goes to slot P + i. Weights are copied once, one
array per layer, in the compute dtype: a step then only reads them. Under a mesh everything lies
where training puts it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from rho1_jax.errors import InputError
from rho1_jax.models import llama
from rho1_jax.models.attention import cached_attention
from rho1_jax.models.generation import prefix
from rho1_jax.models.generation.prefix import Prefix
from rho1_jax.models.llama import LlamaConfig, Params
from rho1_jax.models.rowwise import times_transposed

CHUNK = 8  # tokens: the host sync interval
NOTHING = -1  # what a row that is done emits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy.

    top_p: only the most likely tokens that together have at least this probability (1: all).
    seed: the draw of a row depends on it, on the row's place in the batch, and on nothing else.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature={self.temperature}, top_p={self.top_p}: temperature is at least 0, "
                "top_p above 0 and at most 1."
            )


GREEDY = Sampling()


class State(NamedTuple):
    """Between two tokens."""

    token: Int32[Array, " B"]  # the newest, not yet in the cache
    cache: list[tuple[Array, Array]]  # k and v of each layer, [B, K, slots, hd]
    lengths: Int32[Array, " B"]  # of the prompts
    n: Int32[Array, ""]  # new tokens in the cache
    done: Bool[Array, " B"]
    key: Array


@functools.partial(jax.jit, static_argnames=("config", "sampling", "n_slots"))
def prefill(
    params, before: Prefix, tokens, lengths, stop, key, *, config: LlamaConfig,
    sampling: Sampling, n_slots: int,
) -> tuple[State, Int32[Array, "B 1"]]:  # fmt: skip
    """Read what follows `before`, [B, P] with `lengths` real tokens; each row's first new token.

    n_slots: of the cache, room for the tokens to come.
    """
    hidden, head, (k, v) = prefix.apply_after(params, before, tokens, lengths, config=config)
    room = ((0, 0), (0, 0), (0, n_slots - k.shape[3]), (0, 0))
    cache = [(jnp.pad(k[i], room), jnp.pad(v[i], room)) for i in range(config.n_layers)]
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    none = jnp.zeros((), jnp.int32)
    token = choose(_logits(last, head), none, key, sampling)
    done = _stops(token, stop)
    lengths += k.shape[3] - tokens.shape[1]
    state = State(token, cache, lengths, none, done, key)
    return _readable(state, jnp.where(done, NOTHING, token)[:, None], config)


def unstack(params: Params, config: LlamaConfig) -> Params:
    """Another tree for llama.apply_unstacked, which then neither slices nor casts a weight.

    "layers" is a list of one dict per layer; "head" is always there; matrices are in config.dtype
    and, like the head, stored as [out, in]: see `times_transposed`.
    """
    embed = params["embed"].astype(config.dtype)
    places = np.arange(config.n_layers, dtype=np.int32)
    return {
        "embed": embed,
        "layers": [_layer(params["layers"], i, dtype=config.dtype) for i in places],
        "final_norm": params["final_norm"],
        "head": embed if config.tied_head else params["head"].astype(config.dtype),
    }


@functools.partial(jax.jit, static_argnames="dtype")
def _layer(layers, i: Int32[Array, ""] | np.int32, *, dtype: str) -> Params:
    return {name: x[i] if "norm" in name else x[i].T.astype(dtype) for name, x in layers.items()}


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="state")
def decode(
    params, state: State, stop, limit, n_prompt, *, config: LlamaConfig, sampling: Sampling
) -> tuple[State, Int32[Array, "B C"]]:
    """Up to `limit` more tokens of every row that is not done; prompts have n_prompt slots."""

    def more(carry):
        i, state, _ = carry
        return (i < limit) & ~state.done.all()

    def one(carry):
        i, state, emitted = carry
        logits, cache = step(params, state, config, n_prompt)
        n = state.n + 1
        token = choose(logits, n, state.key, sampling)
        done = state.done | _stops(token, stop)
        emitted = emitted.at[:, i].set(jnp.where(done, NOTHING, token))
        return i + 1, state._replace(token=token, cache=cache, n=n, done=done), emitted

    emitted = jnp.full((len(state.done), CHUNK), NOTHING, jnp.int32)
    _, state, emitted = jax.lax.while_loop(more, one, (0, state, emitted))
    return _readable(state, emitted, config)


def _stops(token: Int32[Array, " B"], stop: Int32[Array, " n"]) -> Bool[Array, " B"]:
    return (token[:, None] == stop).any(axis=1)


def _readable(state: State, emitted: Array, c: LlamaConfig) -> tuple[State, Array]:
    """What is read on the host, replicated on all of them."""
    if c.batch_axes is None:
        return state, emitted
    done, emitted = jax.lax.with_sharding_constraint((state.done, emitted), PartitionSpec())
    return state._replace(done=done), emitted


def step(params, state: State, c: LlamaConfig, n_prompt: Int32[Array, ""]) -> tuple[Array, list]:
    """Put the newest token into the cache: the logits [B, V] of the next one, and the cache.

    n_prompt: slots that prompts have.
    """
    position, slot = state.lengths + state.n, n_prompt + state.n
    slots = jnp.arange(state.cache[0][0].shape[2])
    of_prompt = slots < state.lengths[:, None]
    visible = of_prompt | ((slots >= n_prompt) & (slots <= slot))
    if c.window is not None:
        places = jnp.where(of_prompt, slots, slots - n_prompt + state.lengths[:, None])
        visible &= position[:, None] - places < c.window

    def attend(q, k, v, cached):
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(old, new.transpose(0, 2, 1, 3), slot, axis=2)
            for old, new in zip(cached, (k, v), strict=True)
        )
        return cached_attention(q, k, v, visible[:, None]), (k, v)

    hidden, cache = llama.apply_unstacked(
        params, state.token[:, None], position[:, None], state.cache, config=c, attend=attend
    )
    return _logits(hidden, params["head"]), cache


def _logits(hidden: Float[Array, "B 1 D"], head: Float[Array, "V D"]) -> Float[Array, "B V"]:
    return times_transposed(hidden[:, 0], head, jnp.float32)


def choose(logits: Float[Array, "B V"], n: Array, key: Array, s: Sampling) -> Int32[Array, " B"]:
    """The n-th new token of every row; `key` stands for the seed, which compiles nothing anew."""
    if s.temperature == 0:
        # The first of the largest; jnp.argmax does the same in four times the time on a CPU.
        best = logits == logits.max(axis=-1, keepdims=True)
        places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        return jnp.where(best, places, logits.shape[-1] - 1).min(axis=-1)
    logits = logits / s.temperature
    if s.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ranked, axis=-1)
        n_kept = (jnp.cumsum(p, axis=-1) - p < s.top_p).sum(axis=-1, keepdims=True)
        least = jnp.take_along_axis(ranked, n_kept - 1, axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    key = jax.random.fold_in(key, n)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def padded(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, P] and lengths [B], P rounded up; with more rows until the mesh divides them."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape[axis] for axis in config.batch_axes or ())
    return right_padded(prompts, -(-len(prompts) // shards) * shards)


def right_padded(
    rows: Sequence[Sequence[int]], n_rows: int, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The rows as one array [n_rows, width], and their lengths; missing rows are one token long.

    width: the longest row's, rounded up, unless given.
    """
    width = max(16, rounded(max(map(len, rows)))) if width is None else width
    tokens, lengths = np.zeros((n_rows, width), np.int32), np.ones(n_rows, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths


def rounded(n: int) -> int:
    """Up to one of four sizes per doubling: few shapes to compile, little padding."""
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return -(-max(n, 1) // step) * step
