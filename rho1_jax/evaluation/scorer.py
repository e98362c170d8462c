"""A model as evaluation asks it: log-likelihoods and completions, in batches of similar length."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rho1_jax.models import generate, llama, prefix
from rho1_jax.models.decoding import rounded
from rho1_jax.models.generate import Sampling
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.prefix import Prefix
from rho1_jax.models.tokenizer import Tokenizer

Scored = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would write it
Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation


# A chat model ends its turn with one of these, where a base model ends the document.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


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
        vocabulary = tokenizer.vocabulary
        ends = {vocabulary.index(name) for name in _TURN_ENDS if name in vocabulary}
        self._stop_ids = {tokenizer.separator_id} | ends

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
        # Rows that differ in their last token only are read once.
        askers: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            askers.setdefault(tuple(row[:-1]), []).append(i)
        read = [list(tokens) for tokens in askers]
        for batch in _batches([len(tokens) for tokens in read], self.batch_size):
            asked = [(j, i) for j, u in enumerate(batch) for i in askers[tuple(read[u])]]
            found = self._read(
                [read[u] for u in batch], [(j, rows[i], n_scored[i]) for j, i in asked]
            )
            for (_, i), result in zip(asked, found, strict=True):
                results[i] = result
                done(i, result)
        return results

    def _read(
        self, read: list[list[int]], asked: Sequence[tuple[int, list[int], int]]
    ) -> list[Scored]:
        """asked: which row of `read` is a row but for its last token, that row, and how many of its
        last tokens are scored."""
        most = min(len(row) - 1 - n for _, row, n in asked)
        n_shared = prefix.shared(read, most, self.config)
        before = prefix.read(self.params, read[0][:n_shared], self.config)
        tokens, lengths = _padded([row[n_shared:] for row in read], self.batch_size)
        width = 1 << (max(n for *_, n in asked) - 1).bit_length()
        n_rows = -(-len(asked) // self.batch_size) * self.batch_size
        owner, targets = np.zeros(n_rows, np.int32), np.zeros((n_rows, width), np.int32)
        for i, (j, row, _) in enumerate(asked):
            owner[i] = j
            tail = row[-width:]
            targets[i, width - len(tail) :] = tail
        at = lengths[owner][:, None] - width + np.arange(width, dtype=np.int32)
        loss, greedy = _continuations(
            self.params,
            before,
            tokens,
            lengths,
            owner,
            np.maximum(at, 0),
            targets,
            config=self.config,
        )
        loss, greedy = np.asarray(loss), np.asarray(greedy)
        return [
            (-float(loss[i, width - n :].sum(dtype=np.float64)), bool(greedy[i, width - n :].all()))
            for i, (*_, n) in enumerate(asked)
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
        room = self.max_length - max_new_tokens
        prompts = [self.encode(text)[-room:] or [self.tokenizer.separator_id] for text in texts]
        unstacked = llama.unstack(self.params, self.config)
        for batch in _batches([len(p) for p in prompts], self.batch_size):
            rows = generate.generate(
                self.params,
                self.config,
                [prompts[i] for i in batch],
                max_new_tokens=max_new_tokens,
                stop_ids=self._stop_ids,
                finished=lambda row: any(s in self.tokenizer.decode(row) for s in stop),
                sampling=sampling,
                unstacked=unstacked,
            )
            for i, row in zip(batch, rows, strict=True):
                results[i] = _until(self.tokenizer.decode(row), stop)
                done(i, results[i])
        return results


@jax.jit(static_argnames="config")
def _continuations(
    params: Any,
    before: Prefix,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    owner: Int[Array, " R"],
    at: Int[Array, "R C"],
    targets: Int[Array, "R C"],
    *,
    config: LlamaConfig,
) -> tuple[Float[Array, "R C"], Bool[Array, "R C"]]:
    """-log p of the targets at positions `at` of rows `owner`; whether they are the likeliest."""
    hidden, head, _ = prefix.apply_after(params, before, tokens, lengths, config=config)
    logits = jnp.einsum(
        "rcd,vd->rcv", hidden[owner[:, None], at], head, preferred_element_type=jnp.float32
    )
    at_target = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - at_target
    return loss, jnp.argmax(logits, axis=-1) == targets


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices by length, the longest first: what does not fit is found out at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[start : start + size] for start in range(0, len(order), size))


def _padded(rows: list[list[int]], n_rows: int) -> tuple[np.ndarray, np.ndarray]:
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
