"""The way in: python -m rho1_jax.main --config=configs/math.py[:variant] [--workdir=DIR]

Installed: rho1 --config=math[:variant], the configs that come with the package by their names.

Runs prepare -> reference -> score -> train -> evaluate -> report in DIR (default runs/NAME). What
DIR already holds is not done again, so the same command always resumes. `--stages=score,train` runs
some of them; `--config.a.b=value` overrides a key of the config.

On several hosts start the same command on each. Slurm, Open MPI, TPU slices and GKE are known;
elsewhere add --coordinator=HOST:PORT --num_processes=N --process_id=I. --num_processes=1 is alone.
`--dry_run` checks everything and says what the run will take. `--baseline` trains the same model on
every token, too, in DIR/baseline, and the report shows whether selection helped; `--compare=RUN`
shows another run in its place. `--profile=A:B` traces the training steps A to B into DIR/profile.
`--beam_runner=DirectRunner` tokenizes with Apache Beam; options of the runner follow after a space.
"""

import contextlib
import errno
import functools
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from rho1_jax import command_line, config_file
from rho1_jax import config as config_lib
from rho1_jax.errors import InputError, require_known
from rho1_jax.pipeline import STAGES, baseline, claim, plan
from rho1_jax.pipeline.workspace import NO_OPTIONS, Options, Workspace, say
from rho1_jax.training import hosts, profile, program, sharding
from rho1_jax.training.interruption import Interrupted, StopSignal

OPTIONS: dict[str, Any] = {
    "workdir": "", "stages": "", "dry_run": False, "compare": "", "baseline": False,
    "profile": "", "beam_runner": "",
    "coordinator": "", "num_processes": 0, "process_id": -1,
}  # fmt: skip


class Command(NamedTuple):
    """What a command line asks of `run`."""

    config: ConfigDict
    folder: Path
    stages: tuple[str, ...]
    options: Options
    dry_run: bool


def main(argv: Sequence[str]) -> int:
    """Run what the command line asks for, return the exit status. Bad input is one sentence."""
    status = command_line.run(_status, argv, __doc__)
    if status:
        hosts.leave(status)
    return status


def installed() -> int:
    """The command `rho1` of an installed package."""
    return main(sys.argv)


def _status(argv: Sequence[str]) -> int:
    try:
        command, joining = parse(argv)
        hosts.join(*joining)
        with hosts.only_first_speaks():
            run(*command)
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


def parse(argv: Sequence[str]) -> tuple[Command, tuple[str, int, int]]:
    """The command of a command line, its config locked, and what finds the other hosts
    (hosts.join); InputError if it makes no sense."""
    found = config_file.parse(argv, OPTIONS)
    stages = tuple(found.stages.split(",")) if found.stages else tuple(STAGES)
    for stage in stages:
        require_known("--stages: stage", stage, STAGES)
    folder = Path(found.workdir or Path("runs") / found.config.name)
    joining = found.coordinator, found.num_processes, found.process_id
    traced = profile.steps_of(found.profile) if found.profile else None
    options = Options(found.beam_runner, found.compare, found.baseline, traced)
    return Command(found.config, folder, stages, options, found.dry_run), joining


def run(
    config: ConfigDict,
    folder: Path,
    stages: Sequence[str] = tuple(STAGES),
    options: Options = NO_OPTIONS,
    dry_run: bool = False,
) -> None:
    """Run `stages` of `config` in `folder`. InputError for bad input, Interrupted when stopped.

    dry_run: only check all of them and say what they will take.
    """
    config_lib.validate(config)
    mesh = sharding.make_mesh(**config.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hosts.logging_to_stdout())
        with hosts.together():
            if hosts.first():
                stack.enter_context(claim.held(folder))
        stop = stack.enter_context(StopSignal(mesh).installed())
        stack.enter_context(jax.set_mesh(mesh))
        ws = Workspace(config, folder, mesh, stop, options)
        wanted = {name: stage for name, stage in STAGES.items() if name in stages}
        with hosts.together():
            for stage in wanted.values():
                stage.check(ws)
            plain = baseline.workspace(ws) if options.baseline else None
            if "train" in wanted:
                say("plan", "\n  ".join(["", *plan.lines(ws, compiled=dry_run)]))
            if hosts.first() and not dry_run:
                claim.begin(folder, config)
                if plain:
                    baseline.share_data(plain)
                    claim.begin(plain.folder, plain.config)
        if dry_run:
            return
        with hosts.together():
            if not hosts.first():
                claim.require_shared(folder, config)
        program.keep_compiled(folder)
        for name, stage in wanted.items():
            for each in filter(None, (ws, plain if name in baseline.STAGES else None)):
                hosts.once(functools.partial(claim.bind, each.folder, each.config, name))
                stage.run(each)
            if (signum := stop.after_stage()) is not None:
                raise Interrupted(signum, f"{name} is finished")


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
