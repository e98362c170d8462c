"""Runs that are disturbed at random, many times, must end with the bits of an undisturbed one."""

import collections
import contextlib
import itertools
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rho1_jax.models.formats import digests, load, weights
from tests import launcher
from tests.chaos.disturbances import TIMEOUT, Disturbance, Going

MOST_KILLS = 6  # of one run


class Setting(NamedTuple):
    """What is run: options beside tests/tiny_config.py, and on how many hosts."""

    options: tuple[str, ...] = ()
    hosts: int = 1
    devices: int = 1  # of each host


SETTINGS = {
    "plain": Setting(),
    "live": Setting(("--config.score.cached=False",)),
    "accumulation": Setting(("--config.train.accumulation=2",)),
    "schedule": Setting(("--config.select.final_ratio=0.2",)),
    "average": Setting(("--config.select.ref_ema_decay=0.9",)),
    "devices": Setting(("--config.mesh.fsdp=2", "--config.select.scope=shard"), devices=4),
    "hosts": Setting(("--config.mesh.fsdp=2",), hosts=2, devices=2),
}
# Where a run is: the last of these whose file is there. "start" is before the process holds the
# folder, that is imports and the check of its command.
STAGES = {
    "prepare": "config.json", "reference": "reference/model.json", "score": "scores/noisy",
    "train": "checkpoints/model.json", "evaluate": "checkpoints/steps/8", "report": "eval.json",
    "end": "report.html",
}  # fmt: skip


class Try(NamedTuple):
    """One disturbance, where it hit, and whether the run was as if it had not."""

    setting: str
    disturbance: str
    stage: str
    survived: bool


class Straight(NamedTuple):
    """What an undisturbed run leaves, and how many seconds each of its stages took."""

    kept: Mapping[str, Any]
    seconds: Mapping[str, float]


def start(setting: Setting, texts: Path, folder: Path) -> list[subprocess.Popen]:
    options = (
        "--config=tests/tiny_config.py", f"--config.data.root={texts}", f"--workdir={folder}",
        *setting.options,
    )  # fmt: skip
    return launcher.start(setting.hosts, *options, n_devices=setting.devices)


def straight(setting: Setting, texts: Path, folder: Path) -> Straight:
    """An undisturbed run in `folder`, watched."""
    processes, clock = start(setting, texts, folder), time.monotonic()
    seconds: dict[str, float] = collections.defaultdict(float)
    while any(process.poll() is None for process in processes):
        time.sleep(0.01)
        now = time.monotonic()
        seconds[stage_of(folder, processes)] += now - clock
        clock = now
    ends = launcher.ended(processes, TIMEOUT)
    if any(end.status for end in ends):
        raise RuntimeError(f"the undisturbed run failed: {ends}")
    return Straight(kept(folder), seconds)


def stage_of(folder: Path, processes: Sequence[subprocess.Popen]) -> str:
    """Where the run is; see STAGES."""
    holder = folder / "in_use"
    if not holder.exists() or f"process {processes[0].pid} " not in holder.read_text():
        return "start"
    return next((name for name in reversed(STAGES) if (folder / STAGES[name]).exists()), "start")


def kept(folder: Path) -> dict[str, Any]:
    """All that a run leaves and must not depend on what befell it, by name."""
    found: dict[str, Any] = {"eval.json": json.loads((folder / "eval.json").read_text())}
    for name in ("metrics.csv", "heldout.csv"):
        for path in (folder / name, folder / "reference" / name):
            found[str(path.relative_to(folder))] = launcher.table(path) if path.exists() else None
    for model in ("reference", "checkpoints"):
        if (folder / model / load.MODEL_FILE).exists():
            found |= {f"{model} {part}": digest for part, digest in _saved(folder / model)}
    for path in sorted((folder / "scores").glob("*/*.npy")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    with np.load(folder / "samples.npz") as sample:
        found |= {f"samples {name}": sample[name].tobytes() for name in sample}
    return found


def _saved(folder: Path) -> Iterator[tuple[str, str]]:
    """The newest state of a model folder, part by part: a digest of all its bits."""
    newest = max(int(path.name) for path in (folder / "steps").glob("[0-9]*"))
    yield "step", str(newest)
    for part in load.saved_parts(folder, newest):
        params = load.saved_params(folder, weights.on_first_device, step=newest, part=part)
        yield part, digests.fingerprint(params)


def trial(
    name: str,
    texts: Path,
    folder: Path,
    expected: Straight,
    plan: Sequence[tuple[str, str, Disturbance]],
    rng: random.Random,
) -> tuple[list[Try], str]:
    """The run of a setting with these disturbances (stage, name, what it does), and what was wrong.

    Each hits at a random time from the beginning of its stage on, for as long as that stage takes.
    A run that ends before is not hit.
    """
    setting, hit, wrong = SETTINGS[name], [], ""
    started: list[subprocess.Popen] = []

    def again() -> list[subprocess.Popen]:
        processes = start(setting, texts, folder)
        started.extend(processes)
        return processes

    try:
        for stage, what, disturb in plan:
            processes = again()
            _wait_for(stage, folder, processes)
            time.sleep(rng.uniform(0, expected.seconds.get(stage, 0)))
            if any(process.poll() is not None for process in processes):
                wrong = wrong or _failure(launcher.ended(processes))
                break
            hit.append((what, stage_of(folder, processes)))
            said = disturb(Going(processes, folder, again), rng)
            wrong = wrong or (said and f"{what} in {hit[-1][1]}: {said}")
        ends = launcher.ended(again(), TIMEOUT)
    finally:
        for process in started:
            process.kill()
    wrong = wrong or _failure(ends) or difference(folder, expected)
    return [Try(name, what, stage, not wrong) for what, stage in hit], wrong


def _wait_for(stage: str, folder: Path, processes: Sequence[subprocess.Popen]) -> None:
    order = ["start", *STAGES]
    wanted = order.index(stage)
    while order.index(stage_of(folder, processes)) < wanted:
        if any(process.poll() is not None for process in processes):
            return
        time.sleep(0.005)


def _failure(ends: Sequence[launcher.Ended]) -> str:
    bad = [end for end in ends if end.status]
    return f"the same command ended with {bad[0].status}: {bad[0].err[-1000:]}" if bad else ""


def difference(folder: Path, expected: Straight) -> str:
    ours, theirs = kept(folder), expected.kept
    other = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return f"not the same bits: {', '.join(other)}" if other else ""


def a_plan(
    rng: random.Random, most: int, disturbances: Mapping[str, Disturbance], stages: Sequence[str]
) -> list[tuple[str, str, Disturbance]]:
    """One to `most` disturbances of a run, in the order of its stages."""
    n = rng.randint(1, max(1, min(most, MOST_KILLS)))
    places = sorted(rng.choices(range(len(stages)), k=n))
    return [(stages[i], (what := rng.choice(list(disturbances))), disturbances[what])
            for i in places]  # fmt: skip


def run(
    kills: int,
    names: Sequence[str],
    disturbances: Mapping[str, Disturbance],
    seed: int,
    texts: Path,
    scratch: Path,
    say: Callable[[str], None] = print,
) -> list[Try]:
    """At least that many disturbances, of the settings in turn, each trial in a folder of its own.

    Ctrl-C ends it earlier. What failed is kept beside `scratch`.
    """
    rng, expected = random.Random(seed), {}
    tries: list[Try] = []
    started = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        for number, name in enumerate(itertools.cycle(names)):
            if len(tries) >= kills:
                break
            if name not in expected:
                expected[name] = straight(SETTINGS[name], texts, scratch / name)
                shutil.rmtree(scratch / name)
            stages = [stage for stage in ("start", *STAGES) if stage in expected[name].seconds]
            plan = a_plan(rng, kills - len(tries), disturbances, stages)
            folder = scratch / f"trial-{number}"
            new, wrong = trial(name, texts, folder, expected[name], plan, rng)
            tries += new
            if wrong:
                befell = ", ".join(f"{this.disturbance} in {this.stage}" for this in new)
                say(f"FAILED  {scratch.parent / folder.name} ({name}; {befell}): {wrong}")
                shutil.move(folder, scratch.parent)
            else:
                shutil.rmtree(folder)
            say(_progress(tries, kills, number + 1, time.monotonic() - started))
    return tries


def _progress(tries: Sequence[Try], kills: int, runs: int, seconds: float) -> str:
    lost, a_minute = sum(not this.survived for this in tries), len(tries) / seconds * 60
    left = max(kills - len(tries), 0) / a_minute if tries else float("inf")
    return (
        f"{len(tries)}/{kills} in {runs} runs, {lost} lost  {a_minute:.1f} a minute  "
        f"ETA {left:.0f} min"
    )


def table(tries: Sequence[Try]) -> str:
    """Tried and survived by setting, by disturbance and by stage, in Markdown."""
    lines = ["| | tried | survived |", "| --- | --- | --- |"]
    for field in ("setting", "disturbance", "stage"):
        counts: dict[str, list[bool]] = collections.defaultdict(list)
        for this in tries:
            counts[getattr(this, field)].append(this.survived)
        for value, survived in counts.items():
            lines.append(f"| {field}: {value} | {len(survived)} | {sum(survived)} |")
    lines.append(f"| all | {len(tries)} | {sum(this.survived for this in tries)} |")
    return "\n".join(lines)
