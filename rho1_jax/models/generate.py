"""Text from a decoder: ragged prompts in one batch, a cache of keys and values, greedy or sampled.

    python -m rho1_jax.models.generate --checkpoint=MODEL --prompt="Once upon a time"

Prompts are padded on the right to P tokens, where no real token sees them, and go through the
decoder as in training. Their keys and values are the first P slots of the cache; the i-th new token
of every row goes to slot P + i. Weights are copied once, one array per layer, in the compute dtype:
a step then only reads them. Under a mesh everything lies where training puts it.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from rho1_jax.errors import InputError
from rho1_jax.models import llama, load
from rho1_jax.models.attention import cached_attention, causal_attention
from rho1_jax.models.llama import LlamaConfig, Params
from rho1_jax.models.tokenizer import Tokenizer

_CHUNK = 8  # tokens between two looks at the rows from the host
_NOTHING = -1  # what a row that is done emits


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


def generate(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    finished: Callable[[list[int]], bool] = lambda _: False,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """The new tokens of each prompt, all prompts in one batch.

    A row ends before a token of `stop_ids`, at `max_new_tokens`, or when `finished` says so of its
    new tokens, which it is asked every 8 tokens. All stop when all have ended.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for rows in stream(  # noqa: B007
        params,
        config,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        finished=finished,
        sampling=sampling,
    ):
        pass
    return rows


def stream(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    finished: Callable[[list[int]], bool] = lambda _: False,
    sampling: Sampling = GREEDY,
) -> Iterator[list[list[int]]]:
    """`generate`, but after every few tokens yields the new tokens so far of all rows."""
    if not all(prompts):
        raise InputError("A prompt has no tokens: begin it with the token that ends documents.")
    if max_new_tokens < 1 or not prompts:
        return
    n = len(prompts)
    tokens, lengths = _padded(prompts, config)
    n_chunks = -(-max_new_tokens // _CHUNK)
    state = _prefill(params, tokens, lengths, config=config, n_new=n_chunks * _CHUNK)
    layers = _unstack(params, config=config)
    stop = jnp.array(sorted(stop_ids), jnp.int32)
    rows: list[list[int]] = [[] for _ in prompts]
    done = np.arange(len(tokens)) >= n
    for _ in range(n_chunks):
        state = state._replace(done=jnp.asarray(done))
        state, emitted = _decode(
            layers, state, stop, config=config, sampling=sampling, n_prompt=tokens.shape[1]
        )
        done = np.array(state.done)
        for i, new in enumerate(np.asarray(emitted)[:n]):
            rows[i] = (rows[i] + new[new != _NOTHING].tolist())[:max_new_tokens]
            done[i] = done[i] or finished(rows[i])
        yield [list(row) for row in rows]
        if done.all():
            return


def complete(
    params: Params,
    config: LlamaConfig,
    tok: Tokenizer,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Collection[str] = (),
    sampling: Sampling = GREEDY,
) -> list[str]:
    """What the model writes after each text, up to a stop string or the end of the document."""
    rows = generate(
        params,
        config,
        _encoded(tok, texts),
        max_new_tokens=max_new_tokens,
        stop_ids={tok.separator_id},
        finished=lambda row: _cut(tok.decode(row), stop)[1],
        sampling=sampling,
    )
    return [_cut(tok.decode(row), stop)[0] for row in rows]


def stream_text(
    params: Params,
    config: LlamaConfig,
    tok: Tokenizer,
    text: str,
    *,
    max_new_tokens: int,
    stop: Collection[str] = (),
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """`complete` of one text, piece by piece as it is written."""
    held_back = max(map(len, stop), default=1) - 1  # perhaps the beginning of a stop string
    whole = said = ""
    for (row,) in stream(
        params,
        config,
        _encoded(tok, [text]),
        max_new_tokens=max_new_tokens,
        stop_ids={tok.separator_id},
        finished=lambda row: _cut(tok.decode(row), stop)[1],
        sampling=sampling,
    ):
        whole, _ = _cut(tok.decode(row), stop)
        settled = whole.rstrip("\ufffd")  # a character may be cut in the middle
        settled = settled[: max(len(said), len(settled) - held_back)]
        yield settled[len(said) :]
        said = settled
    yield whole[len(said) :]


class _State(NamedTuple):
    """Between two tokens: logits [B, V] of the next one, and what was seen so far."""

    logits: Float[Array, "B V"]
    cache: list[tuple[Array, Array]]  # k and v of each layer, [B, K, P + n_new, hd]
    lengths: Int32[Array, " B"]  # of the prompts
    n: Int32[Array, ""]  # new tokens so far
    done: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("config", "n_new"))
def _prefill(params, tokens, lengths, *, config: LlamaConfig, n_new: int) -> _State:
    """Read the prompts, [B, P] with `lengths` real tokens each."""

    def attend(q, k, v):
        kept = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        return causal_attention(q, k, v, window=config.window), kept

    # What dynamic rope scaling takes for the length must be the row's, not the padded one.
    positions = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)
    hidden, head, (k, v) = llama.apply_and_keep(
        params, tokens, config=config, positions=positions, attend=attend
    )
    room = ((0, 0), (0, 0), (0, n_new), (0, 0))
    cache = [(jnp.pad(k[i], room), jnp.pad(v[i], room)) for i in range(config.n_layers)]
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    done = jnp.zeros(len(tokens), bool)
    return _State(_logits(last, head), cache, lengths, jnp.zeros((), jnp.int32), done)


@functools.partial(jax.jit, static_argnames="config")
def _unstack(params: Params, *, config: LlamaConfig) -> Params:
    return llama.unstack(params, config)


@functools.partial(
    jax.jit, static_argnames=("config", "sampling", "n_prompt"), donate_argnames="state"
)
def _decode(
    params, state: _State, stop, *, config: LlamaConfig, sampling: Sampling, n_prompt: int
) -> tuple[_State, Array]:
    """Up to _CHUNK more tokens of every row that is not done, [B, _CHUNK]."""

    def more(carry):
        i, state, _ = carry
        return (i < _CHUNK) & ~state.done.all()

    def one(carry):
        i, state, emitted = carry
        token = _choose(state.logits, state.n, sampling)
        done = state.done | (token[:, None] == stop).any(axis=1)
        emitted = emitted.at[:, i].set(jnp.where(done, _NOTHING, token))
        return i + 1, _step(params, token, state._replace(done=done), config, n_prompt), emitted

    emitted = jnp.full((len(state.done), _CHUNK), _NOTHING, jnp.int32)
    _, state, emitted = jax.lax.while_loop(more, one, (0, state, emitted))
    if config.batch_axes is not None:  # every host reads all of it
        whole = PartitionSpec()
        emitted = jax.lax.with_sharding_constraint(emitted, whole)
        state = state._replace(done=jax.lax.with_sharding_constraint(state.done, whole))
    return state, emitted


def _step(params, token: Array, state: _State, c: LlamaConfig, n_prompt: int) -> _State:
    """Put one token [B] into the cache; the state with the logits of the next."""
    position, slot = state.lengths + state.n, n_prompt + state.n
    slots = jnp.arange(state.cache[0][0].shape[2])
    of_prompt = slots < state.lengths[:, None]
    visible = of_prompt | ((slots >= n_prompt) & (slots <= slot))
    if c.window is not None:
        places = jnp.where(of_prompt, slots, slots - n_prompt + state.lengths[:, None])
        visible &= position[:, None] - places < c.window

    def attention_of(cached):
        def attend(q, k, v):
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.transpose(0, 2, 1, 3), slot, axis=2)
                for old, new in zip(cached, (k, v), strict=True)
            )
            return cached_attention(q, k, v, visible), (k, v)

        return attend

    attends = [attention_of(cached) for cached in state.cache]
    hidden, head, cache = llama.apply_unstacked(
        params, token[:, None], position[:, None], attends, config=c
    )
    return state._replace(logits=_logits(hidden, head), cache=cache, n=state.n + 1)


def _logits(hidden: Float[Array, "B 1 D"], head: Float[Array, "V D"]) -> Float[Array, "B V"]:
    return jnp.einsum("bd,vd->bv", hidden[:, 0], head, preferred_element_type=jnp.float32)


def _choose(logits: Float[Array, "B V"], n: Array, s: Sampling) -> Int32[Array, " B"]:
    """The n-th new token of every row."""
    if s.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / s.temperature
    if s.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ranked, axis=-1)
        n_kept = (jnp.cumsum(p, axis=-1) - p < s.top_p).sum(axis=-1, keepdims=True)
        least = jnp.take_along_axis(ranked, n_kept - 1, axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(s.seed), n)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _padded(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, P] and lengths [B]; P is a power of two, so that few shapes are compiled.

    Rows are added until they divide over the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape[axis] for axis in config.batch_axes or ())
    longest = max(map(len, prompts))
    tokens = np.zeros(
        (-(-len(prompts) // shards) * shards, 1 << max(4, (longest - 1).bit_length()))
    )
    lengths = np.ones(len(tokens), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)
    return tokens.astype(np.int32), lengths


def _encoded(tok: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text; an empty text begins like a document, after the end of another."""
    return [encoded.ids.tolist() or [tok.separator_id] for encoded in tok.encode(texts)]


def _cut(text: str, stop: Collection[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(found, default=len(text))], bool(found)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser("generate", description="What a model writes after a text.")
    parser.add_argument("--checkpoint", required=True, help=load.ACCEPTED)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="a text to stop before")
    args = parser.parse_args(argv)
    try:
        sampling = Sampling(args.temperature, args.top_p, args.seed)
        params, config, tok = load.load(args.checkpoint)
        pieces = stream_text(
            params,
            config,
            tok,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            stop=args.stop,
            sampling=sampling,
        )
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
