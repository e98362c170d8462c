"""Whose folder a run's folder is: one process holds it, and one method per stage made what it
holds."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import socket
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax import jsonfile
from rho1_jax.errors import InputError

LOCK = "in_use"  # who holds the folder
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process can hold `folder`; InputError says who does.

    The system's own lock: it ends with the process, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("a+")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): choose another --workdir."
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise InputError(
                f"{folder} is in use by {stream.read().strip() or 'another process'}: wait for it "
                "to end, or use another --workdir."
            ) from error
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        stream.flush()
        yield


def begin(folder: Path, config: ConfigDict) -> None:
    """Make `folder` this config's; InputError where a stage in it was made by another method."""
    if (folder / "config.json").exists():
        jsonfile.read(folder / "config.json")  # what is damaged is not written over
    require_same(folder, config)
    plain = json.loads(config.to_json_best_effort())
    jsonfile.write_sealed(folder / "config.json", plain)
    _write_environment(folder)


def require_same(folder: Path, config: ConfigDict) -> None:
    """InputError if a stage that has begun in `folder` used another value of a key that binds it.

    Keys that say only how to compute bind no stage, and those of a stage that has not begun are
    still free. A training may be asked for more steps (`_may_grow`).
    """
    for stage, there in _bound(folder).items():
        if not _left_something(folder, stage):
            continue
        released = {key: None for key, value in there.items() if value is None}
        here = config_lib.bound_part(config, stage) | released
        length = {k: v for k, v in here.items() if k in (f"{stage}.steps", f"{stage}.epochs")}
        grown = there | length if _may_grow(stage, there, here) else there
        difference = config_lib.first_difference(grown, here)
        if difference:
            hint = ""
            if difference.split()[0] in length:
                hint = (
                    f" (more steps can follow only where nothing depends on how many there are: "
                    f"{stage}.schedule=constant or wsd, select.final_ratio=0 and no "
                    "data.weight_changes)"
                )
            raise InputError(
                f"{folder} holds a run of another config: config.{difference} differ there and "
                f"here, and its stage {stage} has begun{hint}; use another --workdir, or the "
                "config it was started with."
            )


def bind(folder: Path, config: ConfigDict, stage: str) -> None:
    """Take note of what decides the output of a stage that begins."""
    if stage not in config_lib.STAGES:  # it says itself what its output belongs to
        return
    bound, part = _bound(folder), config_lib.bound_part(config, stage)
    if bound.get(stage) != part:
        jsonfile.write_sealed(folder / "bound.json", bound | {stage: part})


def release(folder: Path, stage: str, keys: Iterable[str]) -> None:
    """Let a stage that has begun go on with other values of these keys of its section, once."""
    bound = _bound(folder)
    if stage not in bound:
        return
    free = {f"{stage}.{key}" for key in keys}
    part = {key: None if key in free else value for key, value in bound[stage].items()}
    jsonfile.write_sealed(folder / "bound.json", bound | {stage: part})


def require_shared(folder: Path, config: ConfigDict) -> None:
    """What the other hosts check: that they see the first one's folder and have its config."""
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} is not the folder that the first host writes: give a --workdir on a file "
            "system that all hosts share."
        )
    plain = json.loads(config.to_json_best_effort()), jsonfile.read(folder / "config.json")
    ours, theirs = (config_lib.flat(ConfigDict(values)) for values in plain)
    if difference := config_lib.first_difference(theirs, ours):
        raise InputError(
            f"config.{difference} differ on the first host and on this one: start the same command "
            "on all."
        )


def _left_something(folder: Path, stage: str) -> bool:
    """False for a training that ended before its first checkpoint: nothing is lost with it."""
    place = {"reference": "reference", "train": "checkpoints"}.get(stage)
    return place is None or any((folder / place / "steps").glob("[0-9]*"))


def _may_grow(stage: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a training is to go on for more steps (or epochs), and its first ones are the same:
    neither learning rate, ratio nor mixture go by the share of training that is done, but in a
    decay, which is left."""
    by_share = here.get("select.final_ratio") or here.get("data.weight_changes")
    if here.get(f"{stage}.schedule") not in ("constant", "wsd") or by_share:
        return False
    steps, epochs = ((there[key], here[key]) for key in (f"{stage}.steps", f"{stage}.epochs"))
    return 0 < steps[0] < steps[1] or (steps == (0, 0) and epochs[0] < epochs[1])


def _bound(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "bound.json"
    return jsonfile.read(path) if path.exists() else {}


def _write_environment(folder: Path) -> None:
    """Where the run began; a later start elsewhere (to look at the report, say) changes nothing."""
    path = folder / "environment.json"
    if path.exists():
        return
    environment = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "hosts": jax.process_count(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    jsonfile.write_sealed(path, environment)
