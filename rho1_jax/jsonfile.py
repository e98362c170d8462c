"""JSON files that are whole or not there, and that say so when they are damaged."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rho1_jax import files
from rho1_jax.errors import InputError

_SEAL = "seal"


def read(path: Path) -> dict[str, Any]:
    """The object in `path`, without its seal; InputError if it is not there, not a JSON object, or
    not what was sealed."""
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
    seal = value.pop(_SEAL, None)
    if seal is not None and sealed(value)[_SEAL] != seal:
        raise InputError(
            f"{path} is damaged (its checksum is not that of its content): delete it, and what it "
            "describes is made again."
        )
    return value


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with a checksum of itself, which `read` checks and takes off."""
    return value | {_SEAL: digest(value)}


def digest(value: Any) -> str:
    """Hex sha256 of plain JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all (files.py)."""
    files.write(path, json.dumps(value, indent=1) + "\n")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """`write`, with the checksum that `read` checks."""
    write(path, sealed(value))
