"""A model as evaluation asks it: log-likelihoods and completions, in batches of similar length."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rho1_jax.models import decoding, generate, prefix
from rho1_jax.models.decoding import rounded
from rho1_jax.models.generate import Sampling
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.prefix import Prefix
from rho1_jax.models.tokenizer import Tokenizer

Scored = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would write it
Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation


_TAIL = 32  # tokens: continuations up to so long are read apart from the context they share


class Scorer:
    """One model. Under a mesh, `params` and config.batch_axes say what lies where, and batch_size
    must divide over it. max_length: tokens of context and continuation together.
    """

    def __init__(
        self,
        params: Any,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int = 2048,
    ):
        self.params, self.config, self.tokenizer = params, config, tokenizer
        self.batch_size, self.max_length = batch_size, max_length

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode([text])[0].ids.tolist()

    def score(
        self, pairs: Sequence[Pair], done: Callable[[int, Scored], None] = lambda *_: None
    ) -> list[Scored]:
        """Of each continuation after its context, which is cut on the left to fit.

        done: called with (index, result) as results come.
        """
        results: list[Scored] = [(0.0, True)] * len(pairs)
        rows = [(context + continuation)[-self.max_length - 1 :] for context, continuation in pairs]
        n_scored = [
            min(len(continuation), len(row) - 1)
            for (_, continuation), row in zip(pairs, rows, strict=True)
        ]
        contexts = [tuple(row[: len(row) - n]) for row, n in zip(rows, n_scored, strict=True)]
        times = Counter(contexts)
        # What several continuations follow is read once; a lone row all but its last token.
        askers: dict[tuple[int, ...], list[int]] = {}
        for i, context in enumerate(contexts):
            shares = times[context] > 1 and n_scored[i] <= _TAIL and prefix.possible(self.config)
            askers.setdefault(context if shares else tuple(rows[i][:-1]), []).append(i)
        read = list(askers)
        for batch in _batches([len(tokens) for tokens in read], self.batch_size):
            requests = [(j, i) for j, u in enumerate(batch) for i in askers[read[u]]]
            asked = [_Asked(j, rows[i], n_scored[i]) for j, i in requests]
            found = self._read([read[u] for u in batch], asked)
            for (_, i), result in zip(requests, found, strict=True):
                results[i] = result
                done(i, result)
        return results

    def _read(self, read: Sequence[Sequence[int]], asked: Sequence["_Asked"]) -> list[Scored]:
        """The results of requests whose rows begin with those of `read`."""
        most = min(len(a.row) - 1 - a.n_scored for a in asked)
        n_shared = prefix.shared(read, most, self.config)
        before = prefix.read(self.params, read[0][:n_shared], self.config)
        tokens, lengths = _padded([row[n_shared:] for row in read], self.batch_size)
        n_rows = -(-len(asked) // self.batch_size) * self.batch_size
        width = _power_of_two(max(a.n_scored for a in asked))
        tail_width = _power_of_two(max(len(a.row) - 1 - len(read[a.owner]) for a in asked))
        owner, at = np.zeros(n_rows, np.int32), np.zeros((n_rows, width), np.int32)
        targets, tails = np.zeros_like(at), np.zeros((n_rows, tail_width), np.int32)
        for i, a in enumerate(asked):
            owner[i] = a.owner
            last = a.row[-width:]
            targets[i, width - len(last) :] = last
            at[i] = len(a.row) - 1 - n_shared + np.arange(-width, 0)
            tail = a.row[len(read[a.owner]) : -1]
            tails[i, : len(tail)] = tail
        loss, greedy = _continuations(
            self.params,
            before,
            tokens,
            lengths,
            owner,
            tails,
            np.maximum(at, 0),
            targets,
            config=self.config,
        )
        loss, greedy = np.asarray(loss), np.asarray(greedy)
        found = []
        for i, a in enumerate(asked):
            own = slice(width - a.n_scored, width)
            found.append((-float(loss[i, own].sum(dtype=np.float64)), bool(greedy[i, own].all())))
        return found

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
        room = self.max_length - max_new_tokens
        prompts = [self.encode(text)[-room:] or [self.tokenizer.separator_id] for text in texts]
        unstacked = decoding.unstack(self.params, self.config)
        for batch in _batches([len(p) for p in prompts], self.batch_size):
            rows = generate.generate(
                self.params,
                self.config,
                [prompts[i] for i in batch],
                max_new_tokens=max_new_tokens,
                stop_ids=self.tokenizer.end_ids,
                finished=lambda row: any(s in self.tokenizer.decode(row) for s in stop),
                sampling=sampling,
                unstacked=unstacked,
            )
            for i, row in zip(batch, rows, strict=True):
                results[i] = _until(self.tokenizer.decode(row), stop)
                done(i, results[i])
        return results


class _Asked(NamedTuple):
    """One request: its row of tokens, of which a row that is read (`owner`) is the beginning."""

    owner: int
    row: list[int]
    n_scored: int  # of its last tokens


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
    logits = jnp.einsum("rcd,vd->rcv", x, head, preferred_element_type=jnp.float32)
    at_target = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - at_target
    return loss, jnp.argmax(logits, axis=-1) == targets


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices by length, the longest first: what does not fit is found out at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))


def _power_of_two(n: int) -> int:
    """Up to one, and to 8: few shapes to compile. 0 stays."""
    return max(8, 1 << (n - 1).bit_length()) if n else 0


def _padded(rows: Sequence[Sequence[int]], n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [n_rows, T] padded on the right, lengths [n_rows]; missing rows are filler."""
    tokens = np.zeros((n_rows, rounded(max(map(len, rows)))), np.int32)
    lengths = np.ones(n_rows, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths


def _until(text: str, stop: Sequence[str]) -> str:
    ends = [text.find(s) for s in stop if s and s in text]
    return text[: min(ends, default=len(text))]
