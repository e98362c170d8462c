"""Rows to batches, with Grain: seeded, shuffled, mixed, sharded by host, read ahead.

A batch is a pure function of (seed, step), so the position of a run is one integer.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from rho1_jax import jsonfile
from rho1_jax.data import builder, mixture
from rho1_jax.errors import InputError

_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # batches


class Rows:
    """Random access to the packed rows of one domain and split.

    `rows[i]` is {"tokens": int32 [S+1], "length": int, "bytes": int} and, where the source knows
    the truth, "useful", or where only some targets carry loss, "trained": bool [S];
    `rows.__getitems__([i, ...])` reads several.
    `fingerprint` names the rows' content: what was read, by which tokenizer, cut how.
    """

    def __init__(self, source: Any, *, name: str, manifest: Mapping[str, Any], split: str):
        self._source = source
        self._n: int = manifest["splits"][split]["rows"]
        self.name = name
        self.seq_len: int = manifest["binding"]["seq_len"]
        self.fingerprint = jsonfile.digest([manifest["binding"], split])

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _widened(self._source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [_widened(row) for row in self._source.__getitems__(list(indices))]


def _widened(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"tokens": row["tokens"].astype(np.int32)}  # stored as uint16 where that fits


def open_rows(out: str | Path, domain: str, split: str) -> Rows:
    """Opens what `builder.prepare` wrote to out/domain. A split may have no rows.

    Raises:
        InputError: the domain was never prepared to the end, a file of it is damaged or missing, or
            the split does not exist.
    """
    manifest_path = Path(out) / domain / "manifest.json"
    if not manifest_path.exists():
        raise InputError(f"There are no rows of {domain!r} under {out}: run the stage 'prepare'.")
    builder.require_whole(manifest_path.parent)
    manifest = jsonfile.read(manifest_path)
    if split not in manifest["splits"]:
        raise InputError(f"The domain {domain!r} has no split {split!r}: use 'train' or 'val'.")
    source: Any = []
    if manifest["splits"][split]["rows"]:
        folder = builder.rows_folder(out, domain)
        source = tfds.builder_from_directory(folder).as_data_source(split)
    return Rows(source, name=f"{domain}/{split}", manifest=manifest, split=split)


def train_batches(
    rows: Mapping[str, Rows],
    weights: Mapping[str, float],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    parts: Sequence[int] = (0,),
    n_parts: int = 1,
    scores: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    numbered: Sequence[str] = (),
    later: mixture.Later = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields a host's rows of the batches of the steps start_step, ..., num_steps - 1.

    weights: shares of tokens by domain, in any unit (kept to better than 1 %: Grain counts in
        hundredths of the smallest); a domain of weight 0 is left out. Within a domain every row
        comes once an epoch, and each epoch is shuffled anew.
    later: (step, weights) pairs, ascending: from that step on these are the weights.
    batch_size: rows of the global batch, over all hosts.
    parts: cut into n_parts equal parts of neighbouring rows, a batch gives the host these of them.
    scores: fields of cached scores by domain, such as scores[domain]["ref_loss"] [n_rows, S].
    numbered: all domains, if batches shall say of which each row is.

    A batch: tokens int32 [b, S+1], valid bool [b, S]; useful bool [b, S] if every domain knows
    it; each field of `scores` float32 [b, S]; domain int32 [b], its place in `numbered`.

    Raises:
        InputError: domains, sizes or parts that do not fit together, said at once.
    """
    weights, later = _in_rows(weights, later, batch_size)
    domains = _require_mixture(rows, weights, later, scores)
    _require_parts(batch_size, parts, n_parts)
    if not 0 <= start_step <= num_steps:
        raise InputError(f"start_step {start_step} must lie between 0 and {num_steps} steps.")
    fields = [frozenset(rows[domain][0]) for domain in domains]
    useful = all("useful" in names for names in fields)
    examples = {
        domain: _Examples(
            rows[domain],
            useful,
            (scores or {}).get(domain, {}),
            {"domain": np.int32(numbered.index(domain))} if numbered else {},
        )
        for domain in domains
    }
    # Row n of the endless mixture belongs to step n // batch_size, part p of a step is one batch.
    # The mixture is cut to what is needed: Grain cannot count the batches of an endless one.
    endless = mixture.dataset(examples, weights, seed, later)
    needed = endless.slice(slice(num_steps * batch_size))
    part = needed.batch(batch_size // n_parts)
    steps = grain.MapDataset.source(range(start_step, num_steps))
    mine = steps.map(lambda step: _joined([part[step * n_parts + p] for p in parts]))
    return iter(mine.to_iter_dataset(_AHEAD))


def visited_rows(
    rows: Mapping[str, Rows],
    weights: Mapping[str, float],
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    later: mixture.Later = (),
) -> dict[str, np.ndarray]:
    """domain -> the row numbers that `train_batches` reads in its first num_steps steps, ascending.

    Raises: as `train_batches`.
    """
    weights, later = _in_rows(weights, later, batch_size)
    _require_mixture(rows, weights, later, None)
    n_rows = {domain: len(found) for domain, found in rows.items()}
    seen = mixture.visited(n_rows, weights, seed, num_steps * batch_size, later)
    return {domain: np.flatnonzero(seen.get(domain, [])) for domain in rows}


def rows_of_step(
    rows: Mapping[str, Rows],
    weights: Mapping[str, float],
    *,
    batch_size: int,
    seed: int,
    step: int,
    later: mixture.Later = (),
) -> dict[str, list[int]]:
    """domain -> the row numbers of the batch that `train_batches` gives for a step, from 0 on."""
    weights, later = _in_rows(weights, later, batch_size)
    n_rows = {domain: len(found) for domain, found in rows.items()}
    start = step * batch_size
    return mixture.rows_of(n_rows, weights, seed, start, start + batch_size, later)


def ordered_batches(
    rows: Rows, *, batch_size: int, start_row: int = 0, stop_row: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row of [start_row, stop_row) once, in order.

    A batch has the fields of `train_batches`, and row int64 [b] and bytes int64 [b]. The last one
    is filled with rows whose valid is all False, bytes 0 and row -1.

    Raises:
        InputError: there are no rows at all, or the range does not lie among them.
    """
    stop = len(rows) if stop_row is None else stop_row
    if not len(rows):
        raise InputError(f"{rows.name} has no rows: give it more text, or a split field.")
    if batch_size < 1 or not 0 <= start_row <= stop <= len(rows):
        raise InputError(
            f"Rows {start_row} to {stop} in batches of {batch_size} do not fit the "
            f"{len(rows)} rows of {rows.name}."
        )
    return batches_of(rows, np.arange(start_row, stop), batch_size=batch_size)


def batches_of(
    rows: Rows,
    row_ids: np.ndarray,
    *,
    batch_size: int,
    parts: Sequence[int] = (0,),
    n_parts: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the rows of `row_ids` once each, in that order, as `ordered_batches` does.

    A host with only some `parts` of each batch (see `train_batches`) still gets every `row` number.
    """
    _require_parts(batch_size, parts, n_parts)
    starts = range(0, len(row_ids), batch_size)
    mine = np.arange(batch_size).reshape(n_parts, -1)[list(parts)].reshape(-1)
    batches = grain.MapDataset.source(starts).map(
        lambda start: _batch_of(rows, row_ids[start : start + batch_size], batch_size, mine)
    )
    return iter(batches.to_iter_dataset(_AHEAD))


def _batch_of(
    rows: Rows, row_ids: np.ndarray, size: int, mine: np.ndarray
) -> dict[str, np.ndarray]:
    numbers = np.pad(row_ids, (0, size - len(row_ids)), constant_values=-1)
    wanted = numbers[mine]
    read = rows.__getitems__(wanted[wanted >= 0].tolist())
    filler = {name: np.zeros_like(value) for name, value in (read or [rows[0]])[0].items()}
    read += [filler] * (len(mine) - len(read))
    batch = {name: np.stack([row[name] for row in read]) for name in filler}
    batch["valid"] = _valid(batch.pop("length")[:, None], rows.seq_len, batch.pop("trained", None))
    batch["row"] = numbers
    return batch


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Examples:
    """Rows as training examples, for Grain: with `valid`, and with their cached scores."""

    def __init__(
        self,
        rows: Rows,
        useful: bool,
        scores: Mapping[str, np.ndarray],
        same: dict[str, Any],
    ):
        self._rows, self._scores, self._same = rows, scores, same
        self._useful = ("useful",) if useful else ()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self._rows[index]
        example = {name: row[name] for name in ("tokens", *self._useful)}
        example["valid"] = _valid(row["length"], self._rows.seq_len, row.get("trained"))
        scores = {name: _stored(values[index]) for name, values in self._scores.items()}
        return example | scores | self._same


def _stored(values: np.ndarray) -> np.ndarray:
    """As the step takes it: float32, or int32 of token ids."""
    return values.astype(np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32)


def _valid(length: Any, seq_len: int, trained: np.ndarray | None) -> np.ndarray:
    """True on targets that carry loss: no padding, and of a fine-tuning text only the answers."""
    real = np.arange(seq_len) < length
    return real if trained is None else real & trained


def _require_parts(batch_size: int, parts: Sequence[int], n_parts: int) -> None:
    if batch_size < 1 or batch_size % n_parts or not set(parts) <= set(range(n_parts)):
        raise InputError(
            f"A batch of {batch_size} rows cannot be cut into {n_parts} parts of which a host has "
            f"{list(parts)}: make batch_size a multiple of the number of parts."
        )


def _in_rows(
    weights: Mapping[str, float], later: mixture.Later, batch_size: int
) -> tuple[dict[str, float], mixture.Later]:
    """The weights that are not 0, and the later ones' steps as numbers of rows."""
    phases = [(step * batch_size, of) for step, of in ((0, weights), *later)]
    first, *rest = [(row, {d: weight for d, weight in of.items() if weight}) for row, of in phases]
    return first[1], rest


def _require_mixture(
    rows: Mapping[str, Rows],
    weights: Mapping[str, float],
    later: mixture.Later,
    scores: Mapping[str, Mapping[str, np.ndarray]] | None,
) -> dict[str, Any]:
    """All domains that are read at some time; InputError if they do not fit together."""
    for of in (weights, *(of for _, of in later)):
        if not of or min(of.values()) < 0 or not of.keys() <= rows.keys():
            raise InputError(
                f"The weights {dict(of)} must be positive, and for the domains {sorted(rows)}."
            )
    weights = {domain: weight for _, of in (*later, (0, weights)) for domain, weight in of.items()}
    for domain in weights:
        if not len(rows[domain]):
            raise InputError(f"{rows[domain].name} has no rows: give it more text or weight 0.")
    lengths = {rows[domain].seq_len for domain in weights}
    if len(lengths) > 1:
        raise InputError(f"The domains have rows of different lengths {sorted(lengths)}.")
    if scores is None:
        return weights
    fields = {frozenset(scores.get(domain, {})) for domain in weights}
    if len(fields) > 1:
        raise InputError(f"Not every domain of {sorted(weights)} has the same cached scores.")
    for domain in weights:
        for name, values in scores[domain].items():
            if values.shape[:2] != (len(rows[domain]), rows[domain].seq_len):
                raise InputError(
                    f"The cached {name} of {domain!r} has the shape {values.shape}, not that of "
                    f"its rows, {(len(rows[domain]), rows[domain].seq_len)}: score them again."
                )
    return weights
