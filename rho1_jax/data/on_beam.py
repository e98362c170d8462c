"""Tokenizing on many workers with Apache Beam: the same tokens, in the same order.

The workers read and tokenize the files of a source, one by one, into a folder that they share with
this process, which then streams the tokens of all files in their order. Apache Beam is not in
requirements.txt: `pip install apache-beam`. Its DirectRunner fetches a program from the network
when it first runs; FnApiRunner does without.
"""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax import jsonfile
from rho1_jax.data import corpora, tokens
from rho1_jax.data.corpora import Source
from rho1_jax.data.tokens import Tokenizer, Tokens
from rho1_jax.errors import InputError


def tokenized(
    source: Source,
    *,
    root: str | Path,
    tokenizer: Tokenizer,
    runner: str,
    scratch: Path,
    counts: Counter[str],
) -> Iterator[list[Tokens]]:
    """What `tokens.tokenized` yields of the whole source, in other batches.

    runner: a Beam runner's name and its options, "FlinkRunner --flink_master=HOST:8081".
    scratch: an empty folder that all workers see; 16 bytes a token lie there for a while.

    Raises:
        InputError: Beam is not installed, or what `corpora` says of a file. Here a file without
            usable text is an error even if others have some.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError("--beam_runner needs Apache Beam: pip install apache-beam.") from error
    parts = _parts(source, root)
    name, *flags = shlex.split(runner)
    options = PipelineOptions([*flags, "--no_pipeline_type_check"])  # Tokenizer is a Protocol
    with beam.Pipeline(runner=name, options=options) as pipeline:
        work = pipeline | beam.Create(list(enumerate(parts))) | beam.Reshuffle()
        _ = work | beam.Map(_one_part, root=root, tokenizer=tokenizer, scratch=scratch)
    for i in range(len(parts)):
        said = jsonfile.read(scratch / f"{i}.json")
        if "error" in said:
            raise InputError(said["error"])
        counts.update(said["counts"])
        yield from _read(scratch / str(i), said["batches"])


def _parts(source: Source, root: str | Path) -> list[Source]:
    """The source file by file, where a file alone says all; else as one."""
    files = [] if source.scheme == "tfds" else corpora.source_files(source, root)
    if not files or any(split or "," in str(path) for path, split in files):
        return [source]
    return [dataclasses.replace(source, spec=f"files:{path.resolve()}") for path, _ in files]


def _one_part(
    numbered: tuple[int, Source], root: str | Path, tokenizer: Tokenizer, scratch: Path
) -> None:
    """Tokenize a part into scratch/N, int32 [tokens, 4], and tell its documents in N.json."""
    number, part = numbered
    counts: Counter[str] = Counter()
    batches: list[Any] = []  # of [split, tokens] of each document
    try:
        with (scratch / str(number)).open("wb") as file:
            stream = corpora.split_documents(part, root=root, counts=counts)
            for batch in tokens.tokenized(stream, tokenizer):
                batches.append([[split, x.shape[1]] for split, x in batch])
                file.writelines(np.ascontiguousarray(x.T).tobytes() for _, x in batch)
        said: dict[str, Any] = {"counts": dict(counts), "batches": batches}
    except InputError as error:  # Beam would wrap it in its own words
        said = {"error": str(error)}
    jsonfile.write(scratch / f"{number}.json", said)


def _read(path: Path, batches: list[list[list[Any]]]) -> Iterator[list[Tokens]]:
    with path.open("rb") as file:
        for batch in batches:
            yield [
                (split, np.fromfile(file, np.int32, 4 * n).reshape(n, 4).T) for split, n in batch
            ]
