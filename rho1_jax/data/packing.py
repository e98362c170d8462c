"""Tokens to rows: the stream of each split, cut with stride S, into a TFDS dataset of ArrayRecord.

Row i is stream[i*S : i*S + S + 1], so every token after the first is a target exactly once. The
last row is padded. Where only some targets carry loss, rows without any are left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.sequential_writer import SequentialWriter
from tqdm import tqdm

from rho1_jax.data.tokens import Tokenizer, Tokens

SPLITS = ("train", "val")
_SHARD = 2**28  # tokens in one file

Row = dict[str, Any]
Rows = dict[str, list[Row]]  # by split
Marks = Sequence[str]  # of "useful" and "trained", those that a source has


class PackedRows(FileReaderBuilder):
    """A TFDS dataset of packed rows, streamed to ArrayRecord.

    Features: `tokens [S+1]`; `length`, how many of the S targets are real; `bytes`, the UTF-8
    bytes of the text of those that carry loss; where the source knows the truth, `useful [S]`; and
    where only some targets carry loss, `trained [S]`.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded, so there are no checksums to look for

    def __init__(
        self, *, data_dir: Path, seq_len: int, vocab_size: int, marks: Marks, rows: Iterable[Rows]
    ):
        self._seq_len, self._vocab_size, self._marks = seq_len, vocab_size, marks
        self._rows = rows
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "tokens": _raw(self._seq_len + 1, _token_dtype(self._vocab_size)),
            "length": np.int32,
            "bytes": np.int64,
        }
        features |= {mark: _raw(self._seq_len, np.bool_) for mark in self._marks}
        return _Info(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Streams the rows; TFDS's own writer would hold up to a gigabyte and sort it."""
        del dl_manager, download_config
        info = self._info()  # bound to the folder that TFDS renames when all is written
        writer = SequentialWriter(info, _SHARD // self._seq_len, file_format="array_record")
        writer.initialize_splits(list(SPLITS))
        for batch in self._rows:
            writer.add_examples(batch)
        writer.close_all()
        self.info.set_splits(info.splits)

    def _log_download_bytes(self) -> None:
        """Silent: TFDS would announce a download."""

    _log_download_done = _log_download_bytes


class _Info(tfds.core.DatasetInfo):
    """Of a dataset that is made here."""

    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would look for it in its own bucket, and leave a temporary folder."""


def _raw(size: int, dtype: type) -> tfds.features.Tensor:
    """An array stored as raw bytes, which is faster to parse than TFDS's lists of integers."""
    return tfds.features.Tensor(shape=(size,), dtype=dtype, encoding="bytes")


def _token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.int32


def packed(
    batches: Iterator[list[Tokens]], splits: "dict[str, Packer]", name: str
) -> Iterator[Rows]:
    """The rows of all splits as they fill, with a bar that says how many tokens went by."""
    with tqdm(desc=name, unit="tok", unit_scale=True, mininterval=1, leave=False) as progress:
        for batch in batches:
            for split, document in batch:
                splits[split].add(document)
                progress.update(document.shape[1])
            yield {split: packer.rows() for split, packer in splits.items()}
        yield {split: packer.rows(last=True) for split, packer in splits.items()}


class Packer:
    """The stream of one split, cut into rows as it grows."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, marks: Marks):
        self._separator, self._dtype = tokenizer.separator_id, _token_dtype(tokenizer.vocab_size)
        self._seq_len, self._marks = seq_len, marks
        self._pending: list[np.ndarray] = []  # of the stream, not yet cut
        self.n_untrained = 0  # rows left out
        self.counts = {"documents": 0, "tokens": 0, "rows": 0, "bytes": 0}

    def add(self, document: np.ndarray) -> None:
        self._pending.append(document)
        self.counts["documents"] += 1
        self.counts["tokens"] += document.shape[1]

    def rows(self, last: bool = False) -> list[Row]:
        """The rows that are full, and with `last` the padded one that ends the split."""
        if not self._pending:
            return []
        stream, length = np.concatenate(self._pending, axis=1), self._seq_len
        n = (stream.shape[1] - 1) // length
        rows = [self._row(stream[:, i * length : (i + 1) * length + 1]) for i in range(n)]
        rest = stream[:, n * length :]
        if last and rest.shape[1] > 1:
            rows.append(self._row(rest))
        self._pending = [rest]
        if "trained" in self._marks:
            kept = [row for row in rows if row["trained"].any()]
            self.n_untrained += len(rows) - len(kept)
            rows = kept
        self.counts["rows"] += len(rows)
        self.counts["bytes"] += sum(int(row["bytes"]) for row in rows)
        return rows

    def _row(self, part: np.ndarray) -> Row:
        length = part.shape[1] - 1
        part = np.pad(part, ((0, 0), (0, self._seq_len - length)))
        part[0, length + 1 :] = self._separator
        ids = part[0].astype(self._dtype)
        marked = dict(zip(("useful", "trained"), part[2:, 1:].astype(bool), strict=True))
        counted = part[1, 1:] * marked["trained"] if "trained" in self._marks else part[1, 1:]
        row = {"tokens": ids, "length": np.int32(length), "bytes": counted.sum()}
        return row | {mark: marked[mark] for mark in self._marks}
