"""A model as evaluation asks it: log-likelihoods and completions, in batches of similar length."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rho1_jax.errors import InputError
from rho1_jax.models.generation import decoding, generate, prefix
from rho1_jax.models.generation.generate import Sampling
from rho1_jax.models.generation.prefix import Prefix
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.tokenizer import Tokenizer

Scored = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would write it
Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation


_TAIL = 32  # tokens: continuations up to so long are read apart from the context they share
_CHUNK = 128  # positions whose logits exist at once


class Scorer:
    """One model. Under a mesh, `params` and config.batch_axes say what lies where, and batch_size
    must divide over it.

    max_length: tokens of prompt and answer together; the model's own context unless given, and
      InputError for more. No token is ever read at a position beyond it: a context or prompt loses
      its beginning until the continuation, or the new tokens, fit behind it. A continuation longer
      than max_length is scored in pieces of max_length tokens, each after as much of what precedes
      it as fits. A prompt keeps at least half of max_length; the new tokens get what remains.
    """

    def __init__(
        self,
        params: Any,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        if max_length is not None and not 2 <= max_length <= config.max_length:
            raise InputError(
                f"max_length={max_length}: give at least 2 and at most {config.max_length}, the "
                "tokens of the model's context."
            )
        self.params, self.config, self.tokenizer = params, config, tokenizer
        self.batch_size, self.max_length = batch_size, max_length or config.max_length

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode([text])[0].ids.tolist()

    def fits(self, prompt: str, then: str | int) -> bool:
        """Whether a prompt and its continuation, or so many new tokens, fit whole."""
        if isinstance(then, str):
            return len(self.encode(prompt + then)) <= self.max_length + 1  # the last is not read
        return len(self.encode(prompt)) + then <= self.max_length

    def score(
        self, pairs: Sequence[Pair], done: Callable[[int, Scored], None] = lambda *_: None
    ) -> list[Scored]:
        """Of each continuation after its context.

        done: called with (index, result) as results come.
        """
        windows = [w for i, pair in enumerate(pairs) for w in _windows(i, *pair, self.max_length)]
        missing = Counter(window.pair for window in windows)
        results: list[Scored] = [(0.0, True)] * len(pairs)
        for window, (nats, greedy) in self._scored(windows):
            i = window.pair
            results[i] = results[i][0] + nats, results[i][1] and greedy
            missing[i] -= 1
            if not missing[i]:
                done(i, results[i])
        return results

    def _scored(self, windows: Sequence["_Window"]) -> Iterator[tuple["_Window", Scored]]:
        """Every window and its result, one batch of rows after another."""
        times = Counter(window.context for window in windows)
        # What several continuations follow is read once; a lone row all but its last token.
        askers: dict[tuple[int, ...], list[_Window]] = {}
        for w in windows:
            shares = times[w.context] > 1 and len(w.scored) <= _TAIL
            shares = shares and prefix.possible(self.config)
            askers.setdefault(w.context if shares else w.row[:-1], []).append(w)
        read = list(askers)
        for batch in _batches([len(row) for row in read], self.batch_size):
            rows = [read[i] for i in batch]
            asked = [(owner, window) for owner, row in enumerate(rows) for window in askers[row]]
            found = self._read(rows, asked)
            yield from zip((window for _, window in asked), found, strict=True)

    def _read(
        self, rows: Sequence[tuple[int, ...]], asked: Sequence[tuple[int, "_Window"]]
    ) -> list[Scored]:
        """The results of windows, each of which begins with the row whose index stands by it."""
        owners, windows = zip(*asked, strict=True)
        n_shared = prefix.shared(rows, min(w.start for w in windows) - 1, self.config)
        width = _power_of_two(max(len(w.scored) for w in windows))
        tails = [w.row[len(rows[owner]) : -1] for owner, w in asked]
        n = -(-len(asked) // self.batch_size) * self.batch_size
        # A token is predicted at the position before its own.
        at = [range(w.start - 1 - n_shared, len(w.row) - 1 - n_shared) for w in windows]
        loss, greedy = _continuations(
            self.params,
            prefix.read(self.params, rows[0][:n_shared], self.config),
            *decoding.right_padded([row[n_shared:] for row in rows], self.batch_size),
            np.pad(np.array(owners, np.int32), (0, n - len(owners))),
            decoding.right_padded(tails, n, _power_of_two(max(map(len, tails))))[0],
            decoding.right_padded(at, n, width)[0],
            decoding.right_padded([w.scored for w in windows], n, width)[0],
            config=self.config,
        )
        return [
            (-float(nats[: len(w.scored)].sum()), bool(best[: len(w.scored)].all()))
            for w, nats, best in zip(
                windows, np.asarray(loss, np.float64), np.asarray(greedy), strict=False
            )
        ]

    def complete(
        self,
        texts: Sequence[str],
        *,
        stop: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling = generate.GREEDY,
        done: Callable[[int, str], None] = lambda *_: None,
    ) -> list[str]:
        """The continuation of each text, ended before the first stop string."""
        results = [""] * len(texts)
        most = max(self.max_length - max_new_tokens, self.max_length // 2)
        prompts = [self.encode(text)[-most:] or [self.tokenizer.separator_id] for text in texts]
        room = [self.max_length - len(prompt) for prompt in prompts]
        unstacked = decoding.unstack(self.params, self.config)
        for batch in _batches([len(p) for p in prompts], self.batch_size):
            rows = generate.generate(
                self.params,
                self.config,
                [prompts[i] for i in batch],
                max_new_tokens=min(max_new_tokens, max(room[i] for i in batch)),
                stop_ids=self.tokenizer.end_ids,
                finished=lambda row: generate.cut(self.tokenizer.decode(row), stop)[1],
                sampling=sampling,
                unstacked=unstacked,
            )
            for i, row in zip(batch, rows, strict=True):
                results[i], _ = generate.cut(self.tokenizer.decode(row[: room[i]]), stop)
                done(i, results[i])
        return results


class _Window(NamedTuple):
    """A row of tokens, of which those from `start` on are scored for a pair."""

    pair: int
    row: tuple[int, ...]
    start: int

    @property
    def context(self) -> tuple[int, ...]:
        return self.row[: self.start]

    @property
    def scored(self) -> tuple[int, ...]:
        return self.row[self.start :]


def _windows(
    pair: int, context: list[int], continuation: list[int], max_length: int
) -> Iterator[_Window]:
    """The rows that score a continuation, of max_length tokens and the one that is not read."""
    tokens = (*context, *continuation)
    for start in range(len(context), max(len(tokens), len(context) + 1), max_length):
        end = min(start + max_length, len(tokens))
        row = tokens[max(0, end - max_length - 1) : end]
        yield _Window(pair, row, max(1, len(row) - (end - start)))


@jax.jit(static_argnames="config")
def _continuations(
    params: Any,
    before: Prefix,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    owner: Int[Array, " R"],
    tails: Int[Array, "R E"],
    at: Int[Array, "R C"],
    targets: Int[Array, "R C"],
    *,
    config: LlamaConfig,
) -> tuple[Float[Array, "R C"], Bool[Array, "R C"]]:
    """-log p of the targets, and whether they are the likeliest.

    They are predicted at positions `at` of row `owner`, and of the tail beyond its length.
    """
    hidden, head, kept = prefix.apply_after(params, before, tokens, lengths, config=config)
    x = hidden[owner[:, None], jnp.minimum(at, tokens.shape[1] - 1)]
    if tails.shape[1]:
        whole = lengths + kept[0].shape[3] - tokens.shape[1]
        after = prefix.apply_tails(params, kept, whole, owner, tails, config=config)
        beyond = (at - lengths[owner][:, None])[:, :, None]
        x = jnp.where(
            beyond < 0,
            x,
            jnp.take_along_axis(after, jnp.clip(beyond, 0, tails.shape[1] - 1), axis=1),
        )

    def compared(x_and_targets):
        x, targets = x_and_targets
        logits = jnp.einsum("rd,vd->rv", x, head, preferred_element_type=jnp.float32)
        at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - at_target, logits.argmax(axis=-1) == targets

    by_position = x.swapaxes(0, 1), targets.T
    loss, greedy = jax.lax.map(compared, by_position, batch_size=_CHUNK)
    return loss.T, greedy.T


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices by length, the longest first: what does not fit is found out at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))


def _power_of_two(n: int) -> int:
    """Up to one, and to 8: few shapes to compile. 0 stays."""
    return max(8, 1 << (n - 1).bit_length()) if n else 0
