"""The way in: python -m rho1_jax.main --config=configs/math.py[:variant] [--workdir=DIR]

Runs prepare -> reference -> score -> train -> evaluate -> report in DIR (default runs/NAME). What
DIR already holds is not done again, so the same command always resumes. `--stages=score,train` runs
some of them; `--config.a.b=value` overrides a key of the config.

On several hosts start the same command on each. Slurm, Open MPI, TPU slices and GKE are known;
elsewhere add --coordinator=HOST:PORT --num_processes=N --process_id=I. --num_processes=1 is alone.
`--beam_runner=DirectRunner` tokenizes with Apache Beam; options of the runner follow after a space.
"""

import datetime
import errno
import json
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from rho1_jax import command_line, jsonfile
from rho1_jax import config as config_lib
from rho1_jax.errors import InputError, require_known
from rho1_jax.run import Run
from rho1_jax.stages import STAGES
from rho1_jax.training import hosts, program, sharding
from rho1_jax.training.interruption import Interrupted, StopSignal

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
OPTIONS = {"workdir": "", "stages": "", "beam_runner": "", "coordinator": "", "num_processes": 0,
           "process_id": -1}  # fmt: skip


class Command(NamedTuple):
    """What a command line asks for."""

    config: ConfigDict
    folder: Path
    stages: tuple[str, ...]
    hosts: tuple[str, int, int]  # coordinator, number of processes, number of this one
    beam_runner: str


def main(argv: Sequence[str]) -> int:
    """Run what the command line asks for, return the exit status. Bad input is one sentence."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    status = _status(argv)
    if status:
        hosts.leave(status)
    return status


def _status(argv: Sequence[str]) -> int:
    try:
        command = parse(argv)
        hosts.join(*command.hosts)
        with hosts.only_first_speaks():
            run(command.config, command.folder, command.stages, command.beam_runner)
    except (InputError, hosts.FailedElsewhere) as error:
        return _fail(str(error), 2)
    except Interrupted as stopped:
        if stopped.saved and not hosts.first():  # it stopped with the others, and one says so
            return 128 + stopped.signum
        again = shlex.join(["python", "-m", "rho1_jax.main", *argv[1:]])
        saved = f": {stopped.saved}" if stopped.saved else ""
        return _fail(f"Interrupted{saved}. Resume with\n  {again}", 128 + stopped.signum)
    except Exception as error:
        if _is_disk_full(error):
            return _fail(
                "The disk is full: make room, and the same command resumes from what is saved.", 2
            )
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        return _fail("ended with this error, or because another host did; now all will end.", 1)
    return 0


def parse(argv: Sequence[str]) -> Command:
    """The command of a command line, its config locked; InputError if it makes no sense."""
    found = command_line.parse(argv, OPTIONS)
    stages = tuple(found.stages.split(",")) if found.stages else tuple(STAGES)
    for stage in stages:
        require_known("--stages: stage", stage, STAGES)
    folder = Path(found.workdir or Path("runs") / found.config.name)
    joining = found.coordinator, found.num_processes, found.process_id
    return Command(found.config, folder, stages, joining, found.beam_runner)


def run(
    config: ConfigDict,
    folder: Path,
    stages: Sequence[str] = tuple(STAGES),
    beam_runner: str = "",
) -> None:
    """Run `stages` of `config` in `folder`. InputError for bad input, Interrupted when stopped."""
    config_lib.validate(config)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.require_divisible(config.score.batch_size, 1, mesh, "score")
    sharding.require_even_cut(config.data.seq_len, mesh)
    with hosts.together():
        if hosts.first():
            _claim(folder, config)
            _write_environment(folder)
    with hosts.together():
        if not hosts.first():
            _require_shared(folder, config)
    program.keep_compiled(folder)
    with StopSignal(mesh).installed() as stop, jax.set_mesh(mesh):
        this = Run(config, folder, mesh, stop, beam_runner)
        for name in (name for name in STAGES if name in stages):
            STAGES[name](this)
            if (signum := stop.after_stage()) is not None:
                raise Interrupted(signum, f"{name} is finished")


def _claim(folder: Path, config: ConfigDict) -> None:
    """Make `folder` this config's, or check that it is. Some keys may change (FREE_KEYS)."""
    path = folder / "config.json"
    if path.exists():
        _require_same(path, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        jsonfile.write(path, json.loads(config.to_json_best_effort()))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): choose another --workdir."
        ) from error


def _require_same(path: Path, config: ConfigDict) -> None:
    wanted = config_lib.bound_part(config)
    there = {k: v for k, v in jsonfile.read(path).items() if k in wanted}
    difference = config_lib.first_difference(there, wanted)
    if difference:
        raise InputError(
            f"{path.parent} holds a run of another config: {difference} differ there and here; "
            "use another --workdir, or the config it was started with."
        )


def _require_shared(folder: Path, config: ConfigDict) -> None:
    """What the other hosts check: that they see the first one's folder and have its config."""
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} is not the folder that the first host writes: give a --workdir on a file "
            "system that all hosts share."
        )
    _require_same(folder / "config.json", config)


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
    jsonfile.write(path, environment)


def _is_disk_full(error: BaseException) -> bool:
    return any(
        getattr(e, "errno", None) == errno.ENOSPC or "No space left on device" in str(e)
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fail(message: str, status: int) -> int:
    who = f"host {jax.process_index()}: " if jax.distributed.is_initialized() else ""
    print(who + message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
