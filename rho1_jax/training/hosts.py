"""Several processes as one run: how they find each other, and what only one of them does.

Every host runs the same program on its own devices and sees the same run folder. The first host
(process 0) prints and writes files; the others compute with it and wait where they will read what
it wrote. When one host fails, all end: none is left waiting for a word that never comes.
"""

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rho1_jax.errors import InputError

T = TypeVar("T")

_HEARTBEAT = 60  # seconds of silence after which a host counts as dead and jax ends the others
_GRACE = 2.0  # seconds in which the others may say what they found before the first host goes


class FailedElsewhere(Exception):
    """Another host failed, and has said why."""


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Make this process one of the run's hosts; nothing may have touched a device before.

    What is not given comes from the cluster that jax recognizes (Slurm, Open MPI, TPU slices, GKE);
    where there is none, and with num_processes=1, the process stays alone. InputError if only a
    part of the three is known, or the others do not come.
    """
    if num_processes == 1 and not coordinator:
        return
    # SIGTERM is this package's own: StopSignal saves, and all hosts stop after the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes or None,
            None if process_id < 0 else process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except ValueError as error:
        asked = coordinator or num_processes or process_id >= 0
        if not asked and "coordinator_address" in str(error):  # jax found no cluster
            return
        raise InputError(_not_joined(error)) from error
    except Exception as error:  # of a scheduler's interface, the network, or jax used before
        raise InputError(_not_joined(error)) from error


def _not_joined(error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200]
    return (
        f"The other hosts could not be joined ({reason}): give all of --coordinator=HOST:PORT, "
        "--num_processes and --process_id, or --num_processes=1 to run alone."
    )


def first() -> bool:
    """Whether this is the host that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Inside, what the other hosts print goes nowhere, but for warnings of the log; errors leave
    with the exception."""
    if first():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def logging_to_stdout() -> Iterator[None]:
    """Inside, what the package logs is printed: everything of the first host, and of the others
    their warnings, with their number. A program that has set up the logger itself keeps its way."""
    log = logging.getLogger("rho1_jax")
    if log.handlers:
        yield
        return
    handler = _Printing()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if first() else logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Printing(logging.Handler):
    """Lines on stdout, whatever that is at the time; of other hosts past `only_first_speaks`."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if first():
            print(line, flush=True)
        else:
            print(f"host {jax.process_index()}: {line}", file=sys.__stdout__, flush=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Leave when all hosts have come to the end, or fail on all of them if one fails inside.

    No computation over several hosts may go on inside.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
        if error is None and failed.size:
            raise FailedElsewhere(f"stopped, because host {failed[0]} failed")
    if error is not None:
        raise error


def once(do: Callable[[], T]) -> T | None:
    """What the first host's `do` returns there, None on the others, which wait for it."""
    with together():
        return do() if first() else None


def in_turn(tasks: Iterable[T]) -> list[T]:
    """This host's share of tasks that each host can do alone."""
    return list(tasks)[jax.process_index() :: jax.process_count()]


def of_first(value: np.ndarray | bool) -> np.ndarray:
    """What the first host passed: a file system may show the hosts different files for a while."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def greatest(value: int, mesh: Mesh) -> jax.Array:
    """The greatest of the hosts' values. The array comes at once; reading it waits for them."""
    everywhere = NamedSharding(mesh, P(mesh.axis_names))
    mine = np.full(len(mesh.local_devices), value, np.int32)
    return _max(jax.make_array_from_process_local_data(everywhere, mine))


@jax.jit
def _max(x: jax.Array) -> jax.Array:
    return jnp.max(x)


def gathered(tree: Any) -> Any:
    """The arrays as a whole in the first host's memory; None in their place on the others, which
    hold one at a time."""

    def whole(x: jax.Array) -> Any:
        found = multihost_utils.process_allgather(x, tiled=True)
        return found if first() else None

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def log_folder(folder: Path) -> Iterator[Path]:
    """`folder` on the first host; on others one that is thrown away, so that all run one code."""
    if first():
        yield folder
        return
    with tempfile.TemporaryDirectory() as elsewhere:
        yield Path(elsewhere)


def leave(status: int) -> None:
    """End a failed process among several at once.

    The interpreter's own end would wait for the other hosts, who wait for this one.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if first():  # they lose their coordinator with it
        time.sleep(_GRACE)
    os._exit(status)
