"""A tokenizer small enough to check by hand: every word with the white space before it."""

import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Encoded(NamedTuple):
    ids: np.ndarray
    starts: np.ndarray


class Words:
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
