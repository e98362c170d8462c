"""JSON files that are whole or not there, and that say so when they are damaged."""

import json
import os
from pathlib import Path
from typing import Any

from rho1_jax.errors import InputError


def read(path: Path) -> dict[str, Any]:
    """The object in `path`; InputError if it is not there or not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}): delete it, and what it describes is made again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object.")
    return value


def write(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all: a crash or a full disk leaves the old file, or none."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as stream:
        json.dump(value, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
