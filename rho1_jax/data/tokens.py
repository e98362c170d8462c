"""Documents to tokens: each with its bytes, and whether it is useful and carries loss."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rho1_jax.data import dialogs
from rho1_jax.data.corpora import Document

BATCH = 1_000_000  # characters tokenized at once

# Of one document: its split, and int32 [4, n]: ids, bytes, useful, trained.
Tokens = tuple[str, np.ndarray]


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer: see `rho1_jax.models.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def separator_id(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, texts: Sequence[str]) -> list[Any]: ...


def tokenized(
    stream: Iterator[tuple[str, Document]], tokenizer: Tokenizer
) -> Iterator[list[Tokens]]:
    """Batches of documents, tokenized with all cores, one batch ahead of who takes them."""
    for batch, encoded in _encoded(_batches(stream), tokenizer):
        yield [
            (split, _described(document, tokens.ids, tokens.starts, tokenizer.separator_id))
            for (split, document), tokens in zip(batch, encoded, strict=True)
        ]


def _batches(stream: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, size = [], 0
    for pair in stream:
        batch.append(pair)
        size += len(pair[1].text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterator[list[tuple[str, Document]]], tokenizer: Tokenizer
) -> Iterator[tuple[list[tuple[str, Document]], list[Any]]]:
    before: tuple[list[tuple[str, Document]], Future] | None = None
    with ThreadPoolExecutor(1) as thread:
        for batch in batches:
            future = thread.submit(tokenizer.encode, [document.text for _, document in batch])
            if before:
                yield before[0], before[1].result()
            before = batch, future
        if before:
            yield before[0], before[1].result()


def _described(
    document: Document, ids: np.ndarray, starts: np.ndarray, separator_id: int
) -> np.ndarray:
    """One document and its separator, which stands for no bytes and is never useful."""
    tokens = np.zeros((4, len(ids) + 1), np.int32)
    tokens[0, :-1], tokens[0, -1] = ids, separator_id
    tokens[1, :-1] = token_bytes(document.text, starts)
    for start, stop in document.useful or ():
        tokens[2, :-1] |= (starts >= start) & (starts < stop)
    tokens[3] = dialogs.trained_tokens(document.trained or (), starts, len(document.text))
    return tokens


def token_bytes(text: str, starts: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of each token's text, from the characters where tokens start.

    What lies before the first token counts to it, so that the sum is that of the whole text.
    """
    edges = np.append(starts, len(text)).astype(np.int64)
    edges[:1] = 0
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        edges = np.append(0, np.cumsum(sizes))[edges]
    return np.diff(edges)
