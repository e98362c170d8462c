"""A run's selection for other trainers: python -m rho1_jax.export_scores RUN OUT [--steps=N]

Writes OUT/data/train-*.parquet, a Hugging Face dataset: the rows of the run's batches in the order
of its training, so that with as many rows a step and no shuffling another trainer sees the same
batches. All columns are lists over the tokens of a row, S + 1 of them:

    input_ids      the tokens
    labels         the same where the token is selected, -100 elsewhere
    position_ids   from 0 in each document, where the run keeps documents apart; transformers then
                   lets none see another, too
    ref_loss, ref_entropy   of the reference, in nats, as far as the score reads them; NaN at first
    weight         in the loss, where it is not 1 and 0
    document       which document of the row, from 0; its separator belongs to it
    byte_start, byte_end    in that document's text, as far as it lies in this row

and `domain`, `row` (its number there) and `step` of each row. What needs a policy's loss takes that
of the initial model, or with --model=policy of the trained one: a fixed model, where training asks
the policy of each step. The first step is the same.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from rho1_jax import command_line, jsonfile
from rho1_jax import config as config_lib
from rho1_jax.data import loader
from rho1_jax.errors import InputError
from rho1_jax.models import documents
from rho1_jax.models.tokenizer import Tokenizer
from rho1_jax.pipeline import models
from rho1_jax.pipeline.score import loss_fn
from rho1_jax.pipeline.workspace import Workspace, mixture, n_steps
from rho1_jax.slm.selection import Selection, select
from rho1_jax.slm.step import Batch
from rho1_jax.training import sharding

IGNORED = -100  # a label that PyTorch's cross entropy leaves out
STEPS_IN_A_FILE = 1000

Columns = dict[str, Any]
View = Callable[[Batch, int], Mapping[str, np.ndarray]]


def export(ws: Workspace, out: Path, *, model: str = "initial", steps: int = 0) -> int:
    """Writes the rows of the first `steps` steps (0: of all); returns how many steps."""
    if config_lib.follows_policy(ws.config):
        raise InputError(
            "The reference of this run follows its policy, so that there are no scores to export: "
            "export a run with select.ref_ema_decay=1."
        )
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: name a new folder.")
    c = ws.config
    rows = ws.train_rows(c.data.corpus)
    planned = n_steps(c.train, sum(map(len, rows.values())))
    steps = min(steps, planned) if steps else planned
    # What moves on the way, a ratio or the mixture, goes by the steps of the whole training.
    mixed = mixture(c, "train", planned)
    view = _view(ws, model, dataclasses.replace(ws.selection, steps=planned))
    tables = map(pa.table, _columns_of_steps(ws, rows, view, steps, mixed))
    (out / "data").mkdir(parents=True, exist_ok=True)
    for first in range(0, steps, STEPS_IN_A_FILE):
        path = out / "data" / f"train-{first // STEPS_IN_A_FILE:05}.parquet"
        _write(path, (next(tables) for _ in range(first, min(first + STEPS_IN_A_FILE, steps))))
    return steps


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _columns_of_steps(
    ws: Workspace,
    rows: Mapping[str, loader.Rows],
    view: View,
    steps: int,
    mixed: Mapping[str, Any],
) -> Iterator[Columns]:
    """The columns of each step's rows."""
    names = list(config_lib.mean_shares(ws.config))
    apart = ws.config.data.separate_documents
    scores = ws.cached_scores()
    batches = loader.train_batches(
        rows, **mixed, start_step=0, num_steps=steps, scores=scores, numbered=names
    )
    for step, batch in enumerate(batches):
        known = view(ws.put(batch), step)
        ids = loader.rows_of_step(rows, **mixed, step=step)
        domains = [names[number] for number in batch["domain"]]
        left = {name: iter(numbers) for name, numbers in ids.items()}
        yield {
            "step": np.full(len(domains), step, np.int32),
            "domain": domains,
            "row": np.array([next(left[name]) for name in domains], np.int64),
            **_columns(batch["tokens"], known),
            **(_positions(batch["tokens"], ws.separator) if apart else {}),
            **_places(batch["tokens"], ws.tokenizer),
        }


def _columns(tokens: np.ndarray, known: Mapping[str, np.ndarray]) -> Columns:
    """What is known of targets [B, S] as lists beside the tokens [B, S+1]; the first has none."""
    kept = np.pad(known["kept"], ((0, 0), (1, 0)))
    columns = {"input_ids": tokens, "labels": np.where(kept, tokens, IGNORED)}
    lists = {name: list(x.astype(np.int64)) for name, x in columns.items()}
    for name, x in known.items():
        if name != "kept":
            first = 0.0 if name == "weight" else np.nan
            padded = np.pad(x.astype(np.float32), ((0, 0), (1, 0)), constant_values=first)
            lists[name] = list(padded)
    return lists


def _positions(tokens: np.ndarray, separator: int) -> Columns:
    starts = documents.starts(tokens, separator)
    return {"position_ids": list(np.asarray(documents.positions(starts), np.int64))}


def _places(tokens: np.ndarray, tok: Tokenizer) -> Columns:
    """Document and bytes of each token of rows [B, S+1]."""
    columns: dict[str, list[np.ndarray]] = {"document": [], "byte_start": [], "byte_end": []}
    for row in tokens:
        separators = row == tok.separator_id
        document = np.cumsum(separators) - separators
        ends = []
        for text in np.split(row, np.flatnonzero(separators) + 1):
            words = text[text != tok.separator_id]
            sizes = [len(piece.encode(errors="replace")) for piece in tok.pieces(words)]
            ends.append(np.cumsum(sizes + [0] * (len(text) - len(words)), dtype=np.int64))
        starts = [np.concatenate([[0], end[:-1]]) if len(end) else end for end in ends]
        for name, x in zip(columns, (document, *map(np.concatenate, (starts, ends))), strict=True):
            columns[name].append(x.astype(np.int32))
    return columns


def _view(ws: Workspace, model: str, s: Selection) -> View:
    """A function of a batch and its step to "kept" [B, S], and what of the reference is known."""
    live = s.needs_reference and not ws.caches_scores
    asked = {}
    if "loss" in s.needs:
        fixed = models.initial(ws) if model == "initial" else models.policy(ws)
        asked["loss"] = loss_fn(ws, fixed, entropy=False)
    if live:
        asked["reference"] = loss_fn(ws, models.reference(ws), entropy=s.needs_ref_entropy)
    n = ws.config.train.accumulation if s.scope in ("microbatch", "shard") else 1
    selected = jax.jit(functools.partial(_selected, s, n))

    def view(batch: Batch, step: int) -> Mapping[str, np.ndarray]:
        known = dict(batch.cached)
        if live:
            known |= asked["reference"](batch)
        if "loss" in asked:
            known["loss"] = asked["loss"](batch)["ref_loss"]
        found = selected(batch, known, ws.key, step)
        shown = {name: known[name] for name in ("ref_loss", "ref_entropy") if name in known}
        return {name: np.asarray(x) for name, x in (shown | found).items()}

    return view


def _selected(
    selection: Selection, n: int, batch: Batch, known: dict[str, Any], key: Any, step: Any
) -> dict[str, Any]:
    """The mask of a step, of whose rows i, i + n, i + 2n, ... are one microbatch; and weights."""
    signals = known | {"valid": batch.valid, "targets": batch.tokens[:, 1:]}
    if batch.domain is not None:
        signals["domain"] = batch.domain[:, None]
    if "noise" in selection.needs:
        draw = jax.random.uniform(jax.random.fold_in(key, step), batch.valid.shape)
        signals["noise"] = draw
    ratio = selection.ratio_at(jnp.asarray(step))
    parts = [select(selection, {k: x[i::n] for k, x in signals.items()}, ratio) for i in range(n)]
    mask = jnp.stack(parts, axis=1).reshape(batch.valid.shape)
    if not selection.weight_range and not selection.unselected_weight:
        return {"kept": mask}
    return {"kept": mask, "weight": selection.weights(mask, signals)}


def _config_of(run: Path) -> ConfigDict:
    if not (run / "config.json").exists():
        raise InputError(f"{run} is not the folder of a run: it has no config.json.")
    config = ConfigDict(jsonfile.read(run / "config.json"))
    config_lib.validate(config)
    return config


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> None:
    options = {"steps": 0, "model": ("initial", "policy")}
    args = command_line.parse(argv, options, words=("RUN", "OUT"))
    run, out = map(Path, args.words)
    if args.steps < 0:
        raise InputError(f"--steps is {args.steps}: give 0 for all, or a number of steps.")
    config = _config_of(run)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        steps = export(Workspace(config, run, mesh), out, model=args.model, steps=args.steps)
    rows = config.train.batch_size
    print(f"{out}: {steps} steps of {rows} rows, for load_dataset({str(out)!r})")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
