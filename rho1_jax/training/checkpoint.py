"""Checkpoints (Orbax v1) and model folders.

A model folder is `model.json` (its shape, or where it was loaded from), `tokenizer.json` or
`tokenizer.model`, and one Orbax checkpoint of the TrainState per saved step. The reference model is
never part of a policy's checkpoint: it has a folder of its own.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models import load
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.load import MODEL_FILE
from rho1_jax.models.tokenizer import Tokenizer
from rho1_jax.slm.step import TrainState
from rho1_jax.training import sharding


class Checkpoints:
    """The saved steps of one model folder; the last `keep` stay. A context manager."""

    def __init__(self, folder: Path, keep: int):
        policies = ocp.training.preservation_policies
        self.folder = folder
        self._orbax = ocp.training.Checkpointer(
            folder.resolve() / "steps",
            preservation_policy=policies.LatestN(keep),
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
        """Save in the background, with `binding`: the data and reference it was trained with."""
        self._orbax.save_async(step, state, force=True, custom_metadata=binding)

    def require_binding(self, binding: dict[str, Any]) -> None:
        """InputError if the newest state was trained with other data or another reference."""
        path = self.folder / "steps" / str(self.latest)
        with load.reading(path):
            saved = self._orbax.metadata(self.latest).custom_metadata or {}
        changed = " and ".join(key for key in binding if saved.get(key) != binding[key])
        if changed:
            raise InputError(
                f"Checkpoint {path} was trained with other {changed}: use a new --workdir, or "
                "delete the checkpoints to train again."
            )

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, laid out as `abstract` (shapes with shardings) says.

        InputError if it cannot be read.
        """
        with load.reading(self.folder / "steps" / str(self.latest)):
            return self._orbax.load(self.latest, abstract)


def write_model_file(folder: Path, config: LlamaConfig, tok: Tokenizer) -> None:
    """Make `folder` a model folder; the checkpoints come later."""
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(folder)
    shape = dataclasses.asdict(dataclasses.replace(config, batch_axes=None, scan_layers=True))
    jsonfile.write(folder / MODEL_FILE, {"config": shape})


def write_model_link(folder: Path, source: str) -> None:
    """Make `folder` a model folder that stands for the model at `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    if Path(source).exists():  # else it is the name of a package or of a hub's model
        source = str(Path(source).resolve())
    jsonfile.write(folder / MODEL_FILE, {"source": source})


def load_model(path: str | Path, mesh: Mesh | None = None) -> tuple[Any, LlamaConfig, Tokenizer]:
    """Parameters (float32), shape and tokenizer of whatever models/load.py accepts.

    With a mesh the parameters come sharded over it. InputError if there is no model.
    """
    if mesh is None:
        return load.load(path)
    return load.load(path, functools.partial(sharding.parameter_shardings, mesh=mesh))


def fingerprint(params: Any) -> str:
    """Hex digest of every bit of a parameter tree, computed where the parameters lie."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {leaf.shape} {leaf.dtype} {int(_checksum(leaf))};".encode())
    return digest.hexdigest()


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A sum of the bits, each weighted by its own odd number: order and value both count."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).reshape(-1)
    weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435762) + jnp.uint32(1)
    mixed = (bits ^ (bits >> 15)) * weights
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)
