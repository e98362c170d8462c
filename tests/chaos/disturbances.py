"""What befalls a run: signals, a full disk, a folder that cannot be written.

A disturbance is a function of the run that goes on and of a random generator. It leaves no process
alive, and returns what is wrong with how the run ended, "" if nothing.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests import launcher

TIMEOUT = 1200  # seconds until a disturbed run must have ended, also on a busy machine
ROOM = (0, 4_096, 100_000, 1_000_000, 5_000_000)  # bytes that a full disk may still have


class Going(NamedTuple):
    """A run that goes on, in a folder; start: the same command again."""

    processes: list[subprocess.Popen]
    folder: Path
    start: Callable[[], list[subprocess.Popen]]


Disturbance = Callable[[Going, random.Random], str]


def kill(going: Going, rng: random.Random) -> str:
    """kill -9 of one process."""
    rng.choice(going.processes).kill()
    ends = launcher.ended(going.processes, TIMEOUT)
    left = [e for e in ends if e.status == 0]
    return f"a host ended well without the other: {left}" if 0 < len(left) < len(ends) else ""


def _signals(signum: signal.Signals, times: int) -> Disturbance:
    def send(going: Going, rng: random.Random) -> str:
        process = rng.choice(going.processes)
        for i in range(times):
            time.sleep(rng.uniform(0, 0.5) if i else 0)
            process.send_signal(signum)
        return _stopped(launcher.ended(going.processes, TIMEOUT), signum)

    return send


def _stopped(ends: list[launcher.Ended], signum: signal.Signals) -> str:
    """Saved, and said how to go on; or done just before; or not yet begun, in its imports."""
    for end in ends:
        if end.status not in (0, 128 + signum, -signum):
            return f"ended with {end.status}: {end.err[-500:]}"
        if end.status == 128 + signum and "Traceback" in end.err:
            return f"said a traceback: {end.err[-500:]}"
    return ""


def fill_the_disk(going: Going, rng: random.Random) -> str:
    """Another program takes nearly all room; the run ends, or has room enough for its end."""
    filler = going.folder.parent / "filler"
    _fill(filler, leave=rng.choice(ROOM))
    ends = launcher.ended(going.processes, TIMEOUT)
    filler.unlink()
    return next(filter(None, (_a_sentence(end, "disk is full", or_well=True) for end in ends)), "")


def forbid_writing(going: Going, rng: random.Random) -> str:
    """kill -9, and the next start finds a disk that is mounted read-only."""
    if wrong := kill(going, rng):
        return wrong
    disk = going.folder.parent
    _mount("-o", "remount,ro", str(disk))
    ends = launcher.ended(going.start(), TIMEOUT)
    _mount("-o", "remount,rw", str(disk))
    return _a_sentence(ends[0], "cannot be written", or_well=False)


SIGNALS: dict[str, Disturbance] = {
    "kill -9": kill,
    "SIGTERM": _signals(signal.SIGTERM, 1),
    "Ctrl-C": _signals(signal.SIGINT, 1),
    "Ctrl-C twice": _signals(signal.SIGINT, 2),
}
OF_DISKS: dict[str, Disturbance] = {"full disk": fill_the_disk, "read-only": forbid_writing}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs at `folder` while inside, where the system lets us; whether it did."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and _mount("-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*args: str) -> bool:
    return subprocess.run(["mount", *args], check=False, capture_output=True).returncode == 0


def _fill(path: Path, leave: int) -> None:
    disk = os.statvfs(path.parent)
    free = max(disk.f_bavail * disk.f_frsize - leave, 0)
    with path.open("wb") as stream, contextlib.suppress(OSError):
        os.posix_fallocate(stream.fileno(), 0, max(free, 1))


def _a_sentence(end: launcher.Ended, words: str, *, or_well: bool) -> str:
    if or_well and end.status == 0:
        return ""
    if end.status != 2 or words not in end.err or "Traceback" in end.err:
        return f"ended with {end.status}: {end.err[-1000:]}"
    return ""
