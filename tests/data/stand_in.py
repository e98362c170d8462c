"""A tokenizer small enough to check by hand, a small corpus, and its rows as they are prepared."""

import json
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from rho1_jax.data import builder, loader
from rho1_jax.data.corpora import Source

SOURCE = Source("files:a.jsonl", split_field="split")
SEQ_LEN = 16


class Encoded(NamedTuple):
    ids: np.ndarray
    starts: np.ndarray


class Words:
    """Every word with the white space before it."""

    vocab_size = 1000
    separator_id = 0

    def __init__(self, fingerprint: str = "words"):
        self.fingerprint = fingerprint

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        found = [list(re.finditer(r"\s*\S+|\s+$", text)) for text in texts]
        return [
            Encoded(
                np.array([1 + zlib.crc32(m.group().encode()) % 999 for m in matches], np.int32),
                np.array([m.start() for m in matches], np.int32),
            )
            for matches in found
        ]


def write_corpus(folder, n=60):
    rng = np.random.default_rng(0)
    words = ["one", "zwölf", "三", "\U0001f600!", "x²+1", "\n\nnext"]
    lines = []
    for i in range(n):
        text = " ".join(rng.choice(words, rng.integers(1, 40)))
        lines.append(json.dumps({"text": text, "split": "val" if i % 7 == 3 else "train"}))
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")


def prepare(tmp_path, source=SOURCE, tokenizer=None, seq_len=SEQ_LEN, out="out"):
    return builder.prepare(
        "web",
        source,
        root=tmp_path,
        tokenizer=tokenizer or Words(),
        seq_len=seq_len,
        out=tmp_path / out,
    )


def rows_of(out, split):
    rows = loader.open_rows(out, "web", split)
    return [rows[i] for i in range(len(rows))]


def write_parquet(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [0] * len(texts)}), path)
