"""Text to packed rows: a TFDS builder whose rows are stored as ArrayRecord, written as a stream.

The documents of a split, each followed by a separator, form one stream of tokens, cut with stride
S: row i is stream[i*S : i*S + S + 1], so every token after the first is a target exactly once.
The last row is padded. Memory is flat: nothing is held but a batch of documents and their rows.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.sequential_writer import SequentialWriter
from tqdm import tqdm

from rho1_jax import jsonfile
from rho1_jax.data import builtin, corpora, on_beam, tokens
from rho1_jax.data.corpora import Source
from rho1_jax.data.tokens import Tokenizer, Tokens
from rho1_jax.errors import InputError

FORMAT = 1  # raise it when the same input would give other rows
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
        return tfds.core.DatasetInfo(
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


def _raw(size: int, dtype: type) -> tfds.features.Tensor:
    """An array stored as raw bytes, which is faster to parse than TFDS's lists of integers."""
    return tfds.features.Tensor(shape=(size,), dtype=dtype, encoding="bytes")


def _token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.int32


def prepare(
    domain: str,
    source: Source,
    *,
    root: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    out: str | Path,
    beam_runner: str = "",
) -> dict[str, Any]:
    """Packs one source into out/domain, or says that this is done; returns its manifest.

    beam_runner: tokenize with Apache Beam on this runner (on_beam.py); the rows are the same.

    The rows are bound to the sha256 of the source's files, the tokenizer and the settings: when
    none of them changed nothing is done. A build that was killed is begun again.

    Raises:
        InputError: what `corpora` says of a source; seq_len < 1; the disk is full.
    """
    if seq_len < 1:
        raise InputError(f"seq_len must be at least 1, not {seq_len}.")
    folder = Path(out) / domain
    old = _read(folder / "manifest.json")
    files = _hashed_files(source, root, old.get("files", []))
    binding = {
        "format": FORMAT,
        "spec": source.spec,
        "text": source.text,
        "split_field": source.split_field,
        "sources": _sources_hash(source, files),
        "tokenizer": tokenizer.fingerprint,
        "seq_len": seq_len,
    } | ({"prompt": source.prompt} if source.in_parts else {})
    if old.get("binding") == binding:
        print(f"{domain}: up to date, skipped ({_said(old)})", flush=True)
        if old["files"] != files:  # touched, the same inside: spare the next hashing
            old = old | {"files": files}
            jsonfile.write(folder / "manifest.json", old)
        return old
    _clear(folder)
    start = time.monotonic()
    try:
        manifest = _build(domain, source, root, tokenizer, seq_len, folder, beam_runner)
    except BaseException:
        _clear(folder)
        raise
    if any(_stat(file["path"]) != (file["size"], file["mtime_ns"]) for file in files):
        _clear(folder)
        raise InputError(f"A file of {source.spec!r} changed while it was read: run again.")
    manifest = {"domain": domain, "binding": binding, "files": files} | manifest
    # Last: without it the folder counts as unfinished.
    jsonfile.write(folder / "manifest.json", manifest)
    seconds = time.monotonic() - start
    rate = sum(s["tokens"] for s in manifest["splits"].values()) / seconds
    print(f"{domain}: built ({_said(manifest)}; {rate:,.0f} tokens/s)", flush=True)
    return manifest


def rows_folder(out: str | Path, domain: str) -> Path:
    """Where the TFDS dataset of a prepared domain lies."""
    return Path(out) / domain / PackedRows.name / str(PackedRows.VERSION)


def _build(
    domain: str,
    source: Source,
    root: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    folder: Path,
    beam_runner: str,
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    marks = ["useful"] * (source.scheme == "builtin") + ["trained"] * source.in_parts
    splits = {split: _Packer(tokenizer, seq_len, marks) for split in SPLITS}
    scratch = folder / "scratch"  # not in /tmp: Beam's workers must see it
    if beam_runner:
        scratch.mkdir(parents=True)
        batches = on_beam.tokenized(
            source,
            root=root,
            tokenizer=tokenizer,
            runner=beam_runner,
            scratch=scratch,
            counts=counts,
        )
    else:
        stream = corpora.split_documents(source, root=root, counts=counts)
        batches = tokens.tokenized(stream, tokenizer)
    builder = PackedRows(
        data_dir=folder,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        marks=marks,
        rows=_packed(batches, splits, domain),
    )
    with tempfile.TemporaryDirectory() as nothing:
        try:  # TFDS insists on a folder for downloads
            builder.download_and_prepare(download_dir=nothing)
        except (OSError, RuntimeError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            if not full:
                raise
            raise InputError(f"The disk is full: free some space under {folder.parent}.") from error
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        "counts": dict(sorted(counts.items())),
        "splits": {split: packer.counts for split, packer in splits.items()},
    }


def _packed(
    batches: Iterator[list[Tokens]], splits: "dict[str, _Packer]", name: str
) -> Iterator[Rows]:
    with tqdm(desc=name, unit="tok", unit_scale=True, mininterval=1, leave=False) as progress:
        for batch in batches:
            for split, document in batch:
                splits[split].add(document)
                progress.update(document.shape[1])
            yield {split: packer.rows() for split, packer in splits.items()}
        yield {split: packer.rows(last=True) for split, packer in splits.items()}


class _Packer:
    """The stream of one split, cut into rows as it grows."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, marks: Marks):
        self._separator, self._dtype = tokenizer.separator_id, _token_dtype(tokenizer.vocab_size)
        self._seq_len, self._marks = seq_len, marks
        self._pending: list[np.ndarray] = []  # of the stream, not yet cut
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


# What the rows are bound to


def _hashed_files(source: Source, root: str | Path, known: list[dict]) -> list[dict[str, Any]]:
    """Path, size, time and sha256 of each file; the hash of an unchanged file is taken as known."""
    hashes = {(file["path"], file["size"], file["mtime_ns"]): file["sha256"] for file in known}
    files = []
    for path, _ in corpora.source_files(source, root):
        key = (str(path), *_stat(path))
        files.append(dict(zip(("path", "size", "mtime_ns"), key, strict=True)))
        files[-1]["sha256"] = hashes.get(key) or _sha256(path)
    return files


def _sources_hash(source: Source, files: list[dict[str, Any]]) -> str:
    if source.scheme == "builtin":
        return builtin.fingerprint(source.place)
    listing = [(Path(file["path"]).name, file["sha256"]) for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stat(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    return jsonfile.read(path) if path.exists() else {}


def _clear(folder: Path) -> None:
    """Removes what an earlier build left, the manifest first."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in (PackedRows.name, "scratch"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _said(manifest: dict[str, Any]) -> str:
    splits = "; ".join(
        f"{split} {n['documents']:,} documents, {n['tokens']:,} tokens, {n['rows']:,} rows"
        for split, n in manifest["splits"].items()
    )
    met = {k: n for k, n in manifest["counts"].items() if k not in ("documents", "characters")}
    return splits + "".join(f"; {n:,} {key}" for key, n in met.items() if n)
