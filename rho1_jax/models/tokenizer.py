"""Text to token ids and back, from tokenizer.json, SentencePiece or GGUF files, or trained here.

Text is only text: "<|endoftext|>" inside a document is encoded as the characters it consists of,
and no beginning- or end-of-sequence tokens are added. Where documents end is `separator_id`,
written by whoever packs them.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from rho1_jax import files
from rho1_jax.errors import InputError
from rho1_jax.models import words
from rho1_jax.models.formats import gguf_file

SEPARATOR = "<|endoftext|>"
_END_NAMES = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>")
_PARTIAL_CHARACTER = "\ufffd"


class Encoded(NamedTuple):
    """The n tokens of one text: `ids` int32 [n], and `starts` int32 [n].

    starts[i] is the offset in characters at which the text of token i begins. Where several tokens
    spell one character byte by byte, they repeat its offset.
    """

    ids: np.ndarray
    starts: np.ndarray


class _HuggingFace:
    filename = "tokenizer.json"

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.post_processor = None  # it would add special tokens and trim spaces off offsets
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # as the text they consist of
        self._inner = inner

    def serialized(self) -> bytes:
        return self._inner.to_str().encode()

    def vocabulary(self) -> list[str | None]:
        ids = self._inner.get_vocab(with_added_tokens=True)
        vocabulary: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
        for token, i in ids.items():
            vocabulary[i] = token
        return vocabulary

    def encode(self, texts: list[str]) -> Iterator[tuple[list[int], list[int]]]:
        for encoding in self._inner.encode_batch(texts, add_special_tokens=False):
            yield encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=False)


class _SentencePiece:
    filename = "tokenizer.model"

    def __init__(self, serialized: bytes):
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=serialized)

    def serialized(self) -> bytes:
        return self._inner.serialized_model_proto()

    def vocabulary(self) -> list[str | None]:
        return [self._inner.id_to_piece(i) for i in range(self._inner.get_piece_size())]

    def encode(self, texts: list[str]) -> Iterator[tuple[list[int], list[int]]]:
        for encoding in self._inner.encode(
            texts, return_type="offset_mapping", num_threads=os.cpu_count()
        ):
            yield encoding["ids"], [start for start, _ in encoding["offsets"]]

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids)


_Backend = _HuggingFace | _SentencePiece
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its rules; make one with `load` or `train`."""

    source: str  # where it came from, for messages
    separator_id: int  # written after each document
    _backend: _Backend = dataclasses.field(repr=False)

    @functools.cached_property
    def vocabulary(self) -> list[str | None]:
        """The token of each id, as the file spells it; None for an id that is not used."""
        return self._backend.vocabulary()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        return len(self.vocabulary)

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """The stop tokens: the separator, and what ends a chat model's turn."""
        turns = [self.vocabulary.index(name) for name in _TURN_ENDS if name in self.vocabulary]
        return list(dict.fromkeys([self.separator_id, *turns]))

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of vocabulary and rules: the same for the same tokenizer, saved and loaded."""
        return hashlib.sha256(self._backend.serialized()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokens of each text, on all cores.

        Bytes that a vocabulary lacks have no token (SmolLM2's lacks 21 rare ones).
        """
        return [
            Encoded(np.array(ids, np.int32), np.array(starts, np.int32))
            for ids, starts in self._backend.encode(list(texts))
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of these tokens; U+FFFD where they cut a character."""
        return self._backend.decode([int(i) for i in ids])

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token: the pieces of whole characters, joined, are the decoded text.

        A character spelt by several tokens belongs to the last of them; the others are empty.
        """
        pieces: list[str] = []
        done: list[int] = []
        pending: list[int] = []
        for i in ids:
            pending.append(int(i))
            # Decoded after the piece before it: SentencePiece drops a leading space otherwise.
            before, text = self.decode(done), self.decode(done + pending)
            if text.endswith(_PARTIAL_CHARACTER):
                pieces.append("")
                continue
            pieces.append(text[len(before) :])
            done, pending = pending, []
        if pending:
            pieces[-1] = self.decode(done + pending)[len(self.decode(done)) :]
        return pieces

    def save(self, folder: str | Path, *, sealed: bool = True) -> None:
        """Write tokenizer.json or tokenizer.model into `folder`, where `load` finds it; `sealed`:
        with its checksum beside it."""
        path, raw = Path(folder) / self._backend.filename, self._backend.serialized()
        files.unseal(path)
        files.write(path, raw)
        if sealed:
            files.seal(path)


def load(source: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, a SentencePiece *.model or a *.gguf file, or of a folder.

    A folder is one that holds tokenizer.json or tokenizer.model. Raises InputError for an absent,
    damaged or unsupported file, naming it.
    """
    path = Path(source)
    if path.is_dir():
        inside = [path / _HuggingFace.filename, path / _SentencePiece.filename]
        found = [file for file in inside if file.exists()]
        if not found:
            raise InputError(f"The folder {path} holds neither tokenizer.json nor tokenizer.model.")
        path = found[0]
    readers = {".json": _read_json, ".model": _read_sentencepiece, ".gguf": _read_gguf}
    if path.suffix not in readers:
        raise InputError(
            f"{path} is no tokenizer: give a tokenizer.json, *.model or *.gguf file, or a folder "
            "that holds tokenizer.json or tokenizer.model."
        )
    if not path.is_file():
        raise InputError(f"There is no tokenizer file {path}.")
    files.require_sealed(
        path,
        "delete it and run the stage that wrote it again, or delete the checksum if you changed "
        "the file",
    )
    return _tokenizer(readers[path.suffix](path), str(source))


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens: the same texts always give the same tokens.

    The rules are SmolLM2's: digits stand alone, then GPT-2's split into words. The vocabulary
    holds all 256 bytes and "<|endoftext|>", so any text can be encoded. Words of more than
    words.LONGEST characters (base64, DNA, minified code) are left out: the time of training would
    grow with the square of their length, and they teach nothing. Raises InputError for a
    `vocab_size` below those 257.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise InputError(
            f"vocab_size={vocab_size} is too small: {len(alphabet)} bytes and {SEPARATOR} "
            f"take {len(alphabet) + 1} tokens."
        )
    split = words.digits_apart()
    inner = words.byte_level(
        models.BPE(), pre_tokenizers.Sequence([words.endless_removed(), split])
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.pre_tokenizer = split
    return _tokenizer(_HuggingFace(inner), "trained here")


def require_same(policy: Tokenizer, reference: Tokenizer) -> None:
    """Raise InputError unless every id means the same token to both models."""
    ours, theirs = policy.vocabulary, reference.vocabulary
    if ours == theirs:
        return
    both = f"the policy's tokenizer ({policy.source}) and the reference's ({reference.source})"
    if len(ours) != len(theirs):
        what = f"have {len(ours)} and {len(theirs)} tokens"
    else:
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        what = f"differ: id {i} is {ours[i]!r} and {theirs[i]!r}"
    raise InputError(
        f"{both[0].upper()}{both[1:]} {what}; both models must share one vocabulary, "
        "because losses are compared token by token."
    )


def _tokenizer(backend: _Backend, source: str) -> Tokenizer:
    vocabulary = backend.vocabulary()
    for name in _END_NAMES:
        if name in vocabulary:
            return Tokenizer(source, vocabulary.index(name), backend)
    raise InputError(
        f"{source} has no token that ends a document (none of {', '.join(_END_NAMES)})."
    )


def _read_json(path: Path) -> _Backend:
    try:
        return _HuggingFace(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} is not a tokenizer.json file: {error}.") from error


def _read_sentencepiece(path: Path) -> _Backend:
    try:
        return _SentencePiece(path.read_bytes())
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a SentencePiece model: {error}.") from error


def _read_gguf(path: Path) -> _Backend:
    reader = gguf_file.open_gguf(path)
    get = functools.partial(gguf_file.metadata, reader, path)
    kind = get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _HuggingFace(_bpe_from_gguf(path, get))
    if kind == "llama":
        return _sentencepiece_from_gguf(path, get)
    raise InputError(
        f"{path} has a tokenizer of kind {kind!r}: only 'gpt2' (byte-level BPE) and 'llama' "
        "(SentencePiece) can be read."
    )


# tokenizer.ggml.token_type; SentencePiece's own numbers for the same things.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


def _bpe_from_gguf(path: Path, get: Callable[..., Any]) -> tokenizers.Tokenizer:
    name = get("tokenizer.ggml.pre")
    if name not in words.BY_NAME:
        raise InputError(
            f"{path} splits words by the rule {name!r} (tokenizer.ggml.pre); known are "
            f"{', '.join(words.BY_NAME)}: give the model's tokenizer.json instead."
        )
    tokens, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe")
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} has a damaged vocabulary: {error}.") from error
    inner = words.byte_level(bpe, words.BY_NAME[name]())
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, k in zip(tokens, kinds, strict=True) if k == kind]
        inner.add_tokens(
            [tokenizers.AddedToken(t, special=special, normalized=False) for t in added]
        )
    return inner


def _sentencepiece_from_gguf(path: Path, get: Callable[..., Any]) -> _Backend:
    """The SentencePiece model that these pieces came from: BPE by score, text left as it is."""
    # Here: generated for a newer protobuf than Apache Beam allows (data/on_beam.py).
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    kinds = get("tokenizer.ggml.token_type")
    pieces = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.scores"), kinds
    for piece, score, kind in zip(*pieces, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = _BYTE in kinds
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.add_dummy_prefix = get("tokenizer.ggml.add_space_prefix", True)
    try:
        return _SentencePiece(proto.SerializeToString())
    except RuntimeError as error:
        raise InputError(f"{path} has a damaged vocabulary: {error}.") from error
