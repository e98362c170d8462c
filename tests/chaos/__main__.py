"""Runs that are disturbed or damaged, and what comes of them.

    python -m tests.chaos --kills=200 [--seed=0] [--settings=plain,live]
    python -m tests.chaos --damage [--states=finished,trained,scored] [--files='data/*']

--kills disturbs the tiny run at random times and in all stages, several times each: kill -9,
SIGTERM, Ctrl-C once and twice, and as root a full disk and one that is read-only. It starts the
same command until it is done, and compares every bit of parameters, moments, scores, logs and kept
tokens with a run that nothing disturbed. What is lost stays on disk.

--damage truncates every file of a finished run, flips a bit of it and takes it away, each in a copy
of its own, and asks the same command and `python -m rho1_jax.check` what they say of it.

The exit status is 1 if a run was lost, or damage was used in silence or ended in a traceback.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="compiled-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

from rho1_jax import main as rho1_main  # noqa: E402
from rho1_jax.errors import InputError, require_known  # noqa: E402
from tests.chaos import damage, disturbances, kills  # noqa: E402
from tests.tiny_config import write_texts  # noqa: E402


def killed(asked: argparse.Namespace, scratch: Path) -> bool:
    """Whether all runs survived."""
    texts = write_texts(scratch / "text")
    with disturbances.small_disk(scratch / "disk") as mounted:
        kinds = disturbances.SIGNALS | (disturbances.OF_DISKS if mounted else {})
        names = asked.settings.split(",")
        tries = kills.run(asked.kills, names, kinds, asked.seed, texts, scratch / "disk", say=say)
    say(kills.table(tries))
    return all(this.survived for this in tries)


def damaged(asked: argparse.Namespace, scratch: Path) -> bool:
    """Whether no damage was used in silence, and none ended in a traceback."""
    command = [
        "--config=tests/tiny_config.py", f"--config.data.root={write_texts(scratch / 'text')}",
        "--num_processes=1",
    ]  # fmt: skip
    if rho1_main.main(["main", *command, f"--workdir={scratch / 'run'}"]):
        raise RuntimeError("the run to be damaged failed")
    found, started = [], time.monotonic()
    patterns = [asked.files] if asked.files else []
    states = asked.states.split(",")
    for this in damage.outcomes(
        scratch / "run", scratch, command, states=states, patterns=patterns
    ):
        found.append(this)
        rate = len(found) / (time.monotonic() - started)
        said = f"  {this.said}" if this.verdict in damage.BAD else ""
        say(f"{len(found)} ({rate:.1f} a second)  {this.state}  {this.file} {this.damage}: "
            f"{this.verdict}{said}")  # fmt: skip
    say(damage.table(found))
    return not any(this.verdict in damage.BAD for this in found)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="disturbances, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", default=",".join(kills.SETTINGS))
    parser.add_argument("--damage", action="store_true")
    parser.add_argument("--states", default=",".join(damage.STATES))
    parser.add_argument("--files", default="", help="a pattern of paths in the run's folder")
    asked = parser.parse_args()
    try:
        for name in asked.settings.split(","):
            require_known("--settings: setting", name, kills.SETTINGS)
        for name in asked.states.split(","):
            require_known("--states: state", name, damage.STATES)
    except InputError as error:
        parser.error(str(error))
    scratch, well = Path(tempfile.mkdtemp(prefix="chaos-")), True
    if asked.kills:
        well = killed(asked, scratch)
    if asked.damage:
        well = damaged(asked, scratch) and well
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
