"""Checkpoints (Orbax v1) and model folders.

A model folder is `model.json` (its shape, or where it was loaded from), `tokenizer.json` or
`tokenizer.model`, and one Orbax checkpoint of the TrainState per saved step. The reference model is
never part of a policy's checkpoint: it has a folder of its own.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import digests, load, orbax_reads
from rho1_jax.models.formats.digests import fingerprint as fingerprint
from rho1_jax.models.formats.load import MODEL_FILE
from rho1_jax.models.tokenizer import Tokenizer
from rho1_jax.slm.step import TrainState
from rho1_jax.training import hosts, sharding

T = TypeVar("T")
_log = logging.getLogger("rho1_jax")
_DECAYS = "decays_after"  # the step after which a state depends on how many there will be


class Checkpoints:
    """The saved steps of one model folder; the last `keep` stay. A context manager.

    decays_after: the step after which the learning rate decays towards an end that more steps would
      move; it stays, too, since only from there a longer training can go on.
    """

    def __init__(self, folder: Path, keep: int, decays_after: int | None = None):
        self.folder, self._keep, self.decays_after = folder, keep, decays_after
        self._orbax = self._opened()

    def _opened(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        always = [] if self.decays_after is None else [self.decays_after]
        logging.getLogger("absl").addFilter(_not_raised_again)
        with orbax_reads.quiet():
            return ocp.training.Checkpointer(
                self.folder.resolve() / "steps",
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self._keep), policies.CustomSteps(always)]
                ),
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_exc) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        found = self._orbax.latest
        return None if found is None else found.step

    def save(self, step: int, state: TrainState, binding: dict[str, Any]) -> None:
        """Save in the background, with `binding`: the data and reference it was trained with.

        Digests of both are kept with them. Waits for the state to be computed.
        """
        if self.decays_after is not None:
            binding = {**binding, _DECAYS: self.decays_after}
        parts = {name: part for name, part in state._asdict().items() if part is not None}
        digest = {name: seen.digest for name, seen in digests.look(parts).items()}
        metadata = load.with_own_digest({**binding, load.DIGEST: digest})
        self._orbax.save_async(step, state, force=True, custom_metadata=metadata)

    def decayed(self) -> list[int]:
        """The saved steps that have decayed towards another end than this training's.

        InputError if no others are kept.
        """
        with hosts.together():
            ends = {c.step: self._decays_after(c.step) for c in self._orbax.checkpoints}
        found = [s for s, end in ends.items() if end not in (None, self.decays_after) and s > end]
        if found and len(found) == len(ends):
            raise InputError(
                f"{self.folder} holds no checkpoint from before its decay, which began after step "
                f"{ends[found[0]]}, and more steps can only go on from there: ask for as many as "
                "before, or use a new --workdir."
            )
        return found

    def leave_decayed(self) -> None:
        """Put those aside, into `decayed/`, so that training goes on from before the decay."""
        for step in self.decayed():
            aside = self._put_aside(step, "decayed")
            _log.info(
                "Step %d had decayed towards an earlier end: it is put aside, in %s, and training "
                "goes on from before the decay.", step, aside,
            )  # fmt: skip

    def _decays_after(self, step: int) -> int | None:
        try:
            return load.saved_metadata(self._path(step)).get(_DECAYS)
        except ValueError:  # damaged: `restore` says so
            return None

    def require_binding(self, binding: dict[str, Any]) -> None:
        """InputError if the newest state was trained with other data or another reference."""

        def read(path: Path) -> tuple[Path, Mapping[str, Any]]:
            with hosts.together():
                return path, load.saved_metadata(path)

        _, (path, saved) = self._newest_readable(read)
        changed = " and ".join(key for key in binding if saved.get(key) != binding[key])
        if changed:
            raise InputError(
                f"Checkpoint {path} was trained with other {changed}: use a new --workdir, or "
                "delete the checkpoints to train again."
            )

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state that is whole, laid out as `abstract` (shapes with shardings) says.

        Newer ones that are damaged are put aside, into `damaged/`, with a warning. InputError if
        none is whole.
        """

        def read(path: Path) -> TrainState:
            with hosts.together():
                metadata = load.saved_metadata(path)
                state = self._orbax.load(int(path.name), abstract)
            parts = {name: part for name, part in state._asdict().items() if part is not None}
            load.verify(parts, metadata, path)
            return state

        damaged, state = self._newest_readable(read)
        for step, error in damaged:
            aside = self._put_aside(step, "damaged")
            _log.warning("%s. It is put aside, in %s.", str(error).partition(";")[0], aside)
        return state

    def _newest_readable(self, read: Callable[[Path], T]) -> tuple[list[tuple[int, InputError]], T]:
        """What `read` makes of the newest step that it can read, and the newer ones' errors.

        All hosts agree on the step if `read` fails on all that fail on one. Only what an older
        step can do without error, a newer one is to blame for: else the first error is raised.
        """
        failed: list[tuple[int, InputError]] = []
        for checkpoint in reversed(self._orbax.checkpoints):
            path = self._path(checkpoint.step)
            try:
                with orbax_reads.reading(path):
                    found = read(path)
            except InputError as error:
                failed.append((checkpoint.step, error))
            else:
                return failed, found
        raise failed[0][1]

    def _path(self, step: int) -> Path:
        return self.folder / "steps" / str(step)

    def _put_aside(self, step: int, name: str) -> Path:
        path, aside = self._path(step), self.folder / name

        def move() -> None:
            aside.mkdir(exist_ok=True)
            path.rename(aside / f"{step}-{len(list(aside.iterdir()))}")

        self._orbax.close()
        hosts.once(move)
        self._orbax = self._opened()  # the old one would go on to list what it has seen
        return aside


def resumes_at(folder: Path, decays_after: int | None) -> int:
    """The step that a training with its checkpoints in `folder` goes on from; 0: it has none.

    InputError if all have decayed towards an earlier end.
    """
    if not any((folder / "steps").glob("[0-9]*")):
        return 0
    with Checkpoints(folder, keep=1, decays_after=decays_after) as found:
        return max({c.step for c in found._orbax.checkpoints} - set(found.decayed()), default=0)


def _not_raised_again(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax logs of errors that it raises in the next call, too."""
    return not (record.exc_info and "orbax" in record.pathname)


def write_model_file(folder: Path, architecture: Architecture, tok: Tokenizer) -> None:
    """Make `folder` a model folder; the checkpoints come later."""
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(folder)
    shape = architecture.to_json()
    names = [MODEL_FILE, *(path.name for path in folder.glob("tokenizer.*"))]
    digests_of = load.model_file_digests(folder, shape, names)
    jsonfile.write(folder / MODEL_FILE, {"config": shape, "sha256": digests_of})


def is_described(folder: Path) -> bool:
    """Whether what `write_model_file` writes is there."""
    return (folder / MODEL_FILE).exists() and any(folder.glob("tokenizer.*"))


def write_model_link(folder: Path, source: str) -> None:
    """Make `folder` a model folder that stands for the model at `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    name, step = load.split_step(source)
    if Path(name).exists():  # else it is the name of a package or of a hub's model
        source = str(Path(name).resolve()) + ("" if step is None else f"@{step}")
    jsonfile.write_sealed(folder / MODEL_FILE, {"source": source})


def load_model(path: str | Path, mesh: Mesh | None = None) -> tuple[Any, Architecture, Tokenizer]:
    """Parameters (float32), shape and tokenizer of whatever models/formats/load.py accepts.

    With a mesh the parameters come sharded over it. InputError if there is no model.
    """
    if mesh is None:
        return load.load(path)
    return load.load(path, functools.partial(sharding.parameter_shardings, mesh=mesh))
