"""Is a run's folder whole? python -m rho1_jax.check RUN

Reads all that carries a checksum: rows, scores, tokenizers, models and every kept checkpoint,
and says of each what is whole, what is not, and what to do. Changes nothing. The exit status is 1
if something is damaged.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from rho1_jax import command_line, files, jsonfile
from rho1_jax.data import builder, ref_scores
from rho1_jax.errors import InputError
from rho1_jax.evaluation import selected
from rho1_jax.models import tokenizer
from rho1_jax.models.formats import load, weights
from rho1_jax.pipeline.workspace import BASELINE

Found = tuple[Path, str | None]  # what was looked at, and what is wrong with it
RECORDS = ("config.json", "bound.json", "environment.json", "eval.json", "reference/heldout.json",
           "benchmarks/results.json")  # fmt: skip


def look(folder: Path) -> Iterator[Found]:
    """(path, problem or None) of everything in a run's folder that can be checked.

    InputError if it is no run's folder.
    """
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not the folder of a run: it has no config.json.")
    for name in RECORDS:
        if (folder / name).exists():
            yield from _tried(folder / name, jsonfile.read)
    if any((folder / "data").glob("tokenizer.*")):
        yield from _tried(folder / "data", tokenizer.load)
    for manifest in sorted((folder / "data").glob("*/manifest.json")):
        yield from builder.verify(manifest.parent)
    for kind in ("scores", "utility"):
        for manifest in sorted((folder / kind).glob("*/manifest.json")):
            yield from ref_scores.verify(manifest.parent)
    for name in ("reference", "checkpoints"):
        if (folder / name / load.MODEL_FILE).exists():
            yield from _model(folder / name)
    if (folder / "samples.npz").exists():
        yield from _tried(folder / "samples.npz", selected.load_sample)
    if (folder / BASELINE / "config.json").exists():
        yield from look(folder / BASELINE)
    for part in (folder, folder / "reference"):
        for path in sorted(set(files.sealed(part)) - {folder / "samples.npz"}):
            yield from _tried(path, _sealed)


def _model(folder: Path) -> Iterator[Found]:
    """A model folder: what describes it, and every part of every saved step."""
    yield from _tried(folder / load.MODEL_FILE, lambda _: load.describe(folder))
    steps = (int(path.name) for path in (folder / "steps").glob("[0-9]*") if path.name.isdigit())
    for step in sorted(steps):
        yield from _tried(folder / "steps" / str(step), functools.partial(_state, folder, step))


def _state(folder: Path, step: int, _path: Path) -> None:
    for part in load.saved_parts(folder, step):
        load.saved_params(folder, weights.on_first_device, step=step, part=part)


def _sealed(path: Path) -> None:
    files.require_sealed(path, "put back a copy of it, or have its stage make it again")


def _tried(path: Path, read: Callable[[Path], object]) -> Iterator[Found]:
    try:
        read(path)
    except InputError as error:
        yield path, str(error)
    else:
        yield path, None


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> int:
    (folder,) = command_line.parse(argv, {}, words=("RUN",)).words
    jax.config.update("jax_platforms", "cpu")
    n_damaged = 0
    for path, problem in look(Path(folder)):
        n_damaged += problem is not None
        print(f"whole    {path}" if problem is None else f"DAMAGED  {path}\n         {problem}")
    print(f"{n_damaged} damaged" if n_damaged else "everything is whole")
    return 1 if n_damaged else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
