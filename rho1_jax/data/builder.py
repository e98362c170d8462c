"""Text to packed rows on disk, bound to what they were made from and checked when they are read.

The documents of a split, each followed by a separator, form one stream of tokens, cut into rows
(packing.py). Memory is flat: nothing is held but a batch of documents and their rows. The manifest
of a domain is written last and holds the sha256 of every file of its rows.
"""

import errno
import functools
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rho1_jax import jsonfile
from rho1_jax.data import builtin, corpora, on_beam, packing, tokens
from rho1_jax.data.corpora import Source
from rho1_jax.data.packing import SPLITS, PackedRows, Packer
from rho1_jax.data.tokens import Tokenizer
from rho1_jax.errors import InputError
from rho1_jax.files import sha256

_log = logging.getLogger("rho1_jax")

FORMAT = 2  # raise it when the same input would give other rows


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
    none of them changed, and no file is damaged, nothing is done. A build that was killed is begun
    again.

    Raises:
        InputError: what `corpora` says of a source; seq_len < 1; the disk is full; a split of
            which no token carries loss.
    """
    if seq_len < 1:
        raise InputError(f"seq_len must be at least 1, not {seq_len}.")
    folder = Path(out) / domain
    old = _read(folder / "manifest.json")
    files = _hashed_files(source, root, old.get("files", []))
    binding = _binding(source, files, tokenizer, seq_len)
    if old.get("binding") == binding and _said_whole(domain, folder):
        return _kept(domain, folder, old, files)
    _clear(folder)
    start = time.monotonic()
    try:
        built = _build(domain, source, root, tokenizer, seq_len, folder, beam_runner)
        _require_unchanged(source, files)
    except BaseException:
        _clear(folder)
        raise
    manifest = {"domain": domain, "binding": binding, "files": files} | built
    # Last: without it the folder counts as unfinished.
    jsonfile.write_sealed(folder / "manifest.json", manifest)
    n_tokens = sum(split["tokens"] for split in manifest["splits"].values())
    rate = n_tokens / (time.monotonic() - start)
    print(f"{domain}: built ({_said(manifest)}; {rate:,.0f} tokens/s)", flush=True)
    return manifest


def verify(folder: str | Path) -> Iterator[tuple[Path, str | None]]:
    """(file, what is wrong with it or None) of a prepared domain, out/DOMAIN.

    A file that did not change since it was last checked by this process is not read again.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = jsonfile.read(path)
    except InputError as error:
        yield path, str(error)
        return
    yield path, None
    for name, digest in manifest.get("sha256", {}).items():
        yield Path(folder) / name, _problem(Path(folder) / name, digest)


def require_whole(folder: str | Path) -> None:
    """InputError that names the first file of a prepared domain that is damaged or missing."""
    for path, problem in verify(folder):
        if problem:
            raise InputError(f"{path} {problem}: run the stage 'prepare', which makes it anew.")


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
    splits = {split: Packer(tokenizer, seq_len, marks) for split in SPLITS}
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
        rows=packing.packed(batches, splits, domain),
    )
    try:  # TFDS insists on a folder for downloads
        builder.download_and_prepare(download_dir=scratch)
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full:
            raise
        raise InputError(f"The disk is full: free some space under {folder.parent}.") from error
    shutil.rmtree(scratch, ignore_errors=True)
    for split, packer in splits.items():
        if packer.n_untrained and not packer.counts["rows"]:
            raise InputError(
                f"No token of the split {split!r} of {domain!r} carries loss: give it texts with "
                "answers, or leave the split out."
            )
    counts["rows without loss"] = sum(packer.n_untrained for packer in splits.values())
    return {
        "sha256": _digests(folder),
        "counts": {name: n for name, n in sorted(counts.items()) if n},
        "splits": {split: packer.counts for split, packer in splits.items()},
    }


# What the rows are bound to


def _binding(
    source: Source, files: list[dict[str, Any]], tokenizer: Tokenizer, seq_len: int
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "spec": source.spec,
        "text": source.text,
        "split_field": source.split_field,
        "sources": _sources_hash(source, files),
        "tokenizer": tokenizer.fingerprint,
        "seq_len": seq_len,
    } | ({"prompt": source.prompt} if source.in_parts else {})


def _require_unchanged(source: Source, files: list[dict[str, Any]]) -> None:
    if any(_stat(file["path"]) != (file["size"], file["mtime_ns"]) for file in files):
        raise InputError(f"A file of {source.spec!r} changed while it was read: run again.")


def _kept(
    domain: str, folder: Path, old: dict[str, Any], files: list[dict[str, Any]]
) -> dict[str, Any]:
    print(f"{domain}: up to date, skipped ({_said(old)})", flush=True)
    if old["files"] == files:
        return old
    touched = old | {"files": files}  # the same inside: spare the next hashing
    jsonfile.write_sealed(folder / "manifest.json", touched)
    return touched


def _hashed_files(source: Source, root: str | Path, known: list[dict]) -> list[dict[str, Any]]:
    """Path, size, time and sha256 of each file; the hash of an unchanged file is taken as known."""
    hashes = {(file["path"], file["size"], file["mtime_ns"]): file["sha256"] for file in known}
    files = []
    for path, _ in corpora.source_files(source, root):
        key = (str(path), *_stat(path))
        files.append(dict(zip(("path", "size", "mtime_ns"), key, strict=True)))
        files[-1]["sha256"] = hashes.get(key) or sha256(path)
    return files


def _sources_hash(source: Source, files: list[dict[str, Any]]) -> str:
    if source.scheme == "builtin":
        return builtin.fingerprint(source.place)
    listing = [(Path(file["path"]).name, file["sha256"]) for file in files]
    return jsonfile.digest(listing)


# Whether the rows are whole


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a domain's rows, by its path in the folder."""
    paths = sorted(path for path in (folder / PackedRows.name).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _known_sha256(path, *_stat(path)) for path in paths}


def _problem(path: Path, digest: str) -> str | None:
    try:
        found = _known_sha256(path, *_stat(path))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == digest else "is damaged"


@functools.cache
def _known_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Once for each state of a file: every stage of a process opens the same rows."""
    del size, mtime_ns
    return sha256(path)


def _said_whole(domain: str, folder: Path) -> bool:
    """Whether all files of the rows are as they were written; says which is not."""
    for path, problem in verify(folder):
        if problem:
            _log.warning("%s: %s %s, built again", domain, path, problem)
            return False
    return True


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
