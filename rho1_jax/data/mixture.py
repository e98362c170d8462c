"""The endless mixture of domains that training reads, and which rows a part of it visits.

Grain makes the mixture. Which rows its first n elements are can be worked out for whole arrays at
once, from the counts of its mixing and the permutation of its shuffle (a Feistel network keyed by
std::seed_seq, walked until it lands inside: github.com/google/grain, index_shuffle.cc). A sample is
compared with the mixture itself; if a release of Grain shuffles otherwise, that is asked row by
row, at 20 microseconds each.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np
from tqdm import tqdm

_BLOCK = 2**16  # rows at once: they stay in the processor's cache
_SAMPLE = 500  # elements that are compared with Grain's
_ROUNDS = 4
_FEW = 2**14  # rows; with fewer the walk, in blocks of at least 16 bits, is long
_ENDLESS = 2**48  # elements

# From which element on the weights are which, in order; each leaves out what has none.
Later = Sequence[tuple[int, Mapping[str, float]]]


def dataset(
    parts: Mapping[str, Any], weights: Mapping[str, float], seed: int, later: Later = ()
) -> grain.MapDataset:
    """The endless mixture: domains in the ratio of weights, each shuffled anew each epoch.

    later: other weights from some element on. A domain goes on where it was: no row comes twice
      before all have come.
    """
    shuffled = {
        domain: grain.MapDataset.source(parts[domain])
        .shuffle(seed=_domain_seed(seed, domain))
        .repeat()
        for domain in _domains(weights, later)
    }
    if not later:
        return grain.MapDataset.mix(list(shuffled.values()), list(weights.values()))
    found, used = [], dict.fromkeys(shuffled, 0)
    for of_phase, length in _phases(weights, later, _ENDLESS):
        rest = [shuffled[domain].slice(slice(used[domain], None)) for domain in of_phase]
        mixed = grain.MapDataset.mix(rest, list(of_phase.values()))
        found.append(mixed.slice(slice(length)))
        for domain, count in _counts(of_phase, length).items():
            used[domain] += count
    return grain.MapDataset.concatenate(found)


def visited(
    n_rows: Mapping[str, int], weights: Mapping[str, float], seed: int, n: int, later: Later = ()
) -> dict[str, np.ndarray]:
    """domain -> bool [its rows]: which of them the first n elements of the mixture are."""
    domains = _domains(weights, later)
    elements = dataset({d: _Numbers(d, n_rows[d]) for d in domains}, weights, seed, later)
    seen = {domain: np.zeros(n_rows[domain], bool) for domain in domains}
    counts = dict.fromkeys(domains, 0)
    for of_phase, length in _phases(weights, later, n):
        for domain, count in _counts(of_phase, length).items():
            counts[domain] += count
    for domain, count in counts.items():
        # The rows of a whole epoch are those of all later ones.
        for start in range(0, min(count, n_rows[domain]), _BLOCK):
            places = np.arange(start, min(start + _BLOCK, count, n_rows[domain]), dtype=np.uint64)
            seen[domain][_shuffled(places, n_rows[domain], _domain_seed(seed, domain))] = True
    sample = np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(np.int64))
    if all(seen[domain][row] for domain, row in (elements[i] for i in sample.tolist())):
        return seen
    return _asked(elements, n_rows, n)


def rows_of(
    n_rows: Mapping[str, int],
    weights: Mapping[str, float],
    seed: int,
    start: int,
    stop: int,
    later: Later = (),
) -> dict[str, list[int]]:
    """domain -> the row numbers that the elements [start, stop) of the mixture are, in order."""
    numbers = {d: _Numbers(d, n_rows[d]) for d in _domains(weights, later)}
    elements = dataset(numbers, weights, seed, later)
    found: dict[str, list[int]] = {}
    for domain, row in (elements[i] for i in range(start, stop)):
        found.setdefault(domain, []).append(row)
    return found


def _asked(elements: grain.MapDataset, n_rows: Mapping[str, int], n: int) -> dict[str, np.ndarray]:
    """What `visited` gives, element by element."""
    seen = {domain: np.zeros(rows, bool) for domain, rows in n_rows.items()}
    for i in tqdm(range(n), "rows to score", delay=5, leave=False):
        domain, row = elements[i]  # iterating over a slice would start threads
        seen[domain][row] = True
    return seen


def _domains(weights: Mapping[str, float], later: Later) -> list[str]:
    """All that have a weight at some time."""
    return list(dict.fromkeys([*weights, *(domain for _, of in later for domain in of)]))


def _phases(
    weights: Mapping[str, float], later: Later, n: int
) -> Iterator[tuple[Mapping[str, float], int]]:
    """The weights one after the other, and of how many of the first n elements they are those."""
    stops = [min(start, n) for start, _ in later] + [n]
    start = 0
    for of_phase, stop in zip([weights, *(of for _, of in later)], stops, strict=True):
        if stop > start:
            yield of_phase, stop - start
        start = stop


def _counts(weights: Mapping[str, float], n: int) -> dict[str, int]:
    """How many of the first n elements come from each domain: Grain takes them off in turn."""
    smallest = min(weights.values())
    shares = {domain: int(weight * (100 / smallest)) for domain, weight in weights.items()}
    counts, left, total = {}, n, sum(shares.values())
    for domain, share in shares.items():
        rest = left * (total - share) // total
        counts[domain], left, total = left - rest, rest, total - share
    return counts


def _shuffled(places: np.ndarray, n_rows: int, seed: int) -> np.ndarray:
    """The rows at these places [n] of a shuffled epoch, as `grain.experimental.index_shuffle`."""
    if n_rows < _FEW:
        ask = functools.partial(
            grain.experimental.index_shuffle, max_index=n_rows - 1, seed=seed, rounds=_ROUNDS
        )
        return np.array([ask(place) for place in places.tolist()], np.int64)
    bits = int(np.ceil(np.log2(n_rows - 1)))
    half = max(bits + bits % 2, 16) // 2
    keys = _round_keys(seed)
    found = places.copy()
    outside = np.arange(len(places))
    while outside.size:
        found[outside] = _encrypted(found[outside], half, keys)
        outside = outside[found[outside] >= n_rows]
    return found.astype(np.int64)


def _encrypted(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    """Simon's rounds on blocks of two words, each of `half` bits."""
    mask = np.uint64(2**half - 1)

    def turned(x: np.ndarray, by: int) -> np.ndarray:
        return (x << np.uint64(by) | x >> np.uint64(half - by)) & mask

    left, right = values >> np.uint64(half) & mask, values & mask
    for key in keys:
        mixed = turned(right, 1) & turned(right, 8) ^ turned(right, 2)
        left, right = right, left ^ mixed ^ (np.uint64(key) & mask)
    return left << np.uint64(half) | right


def _round_keys(seed: int) -> list[int]:
    """The first _ROUNDS numbers of C++'s std::seed_seq{seed} (ISO C++, rand.util.seedseq)."""
    n, last = _ROUNDS, 2**32 - 1
    state = [0x8B8B8B8B] * n

    def spread(x: int, factor: int) -> int:
        return (x ^ x >> 27) * factor & last

    for k in range(n):
        b, c = (k + 1) % n, (k + 2) % n
        first = spread(state[k] ^ state[b] ^ state[k - 1], 1664525)
        second = first + k + {0: 1, 1: seed}.get(k, 0) & last
        state[b], state[c], state[k] = state[b] + first & last, state[c] + second & last, second
    for k in range(n):
        b, c = (k + 1) % n, (k + 2) % n
        first = spread(state[k] + state[b] + state[k - 1] & last, 1566083941)
        second = first - k & last
        state[b], state[c], state[k] = state[b] ^ first, state[c] ^ second, second
    return state


class _Numbers:
    """(domain, row number), for Grain: which rows a mixture visits, without reading them."""

    def __init__(self, domain: str, n_rows: int):
        self._domain, self._n_rows = domain, n_rows

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self._domain, int(index)


def _domain_seed(seed: int, domain: str) -> int:
    """Grain adds the epoch to its seed, so near seeds would share epochs: hash them apart."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{domain}".encode()).digest()[:4])
