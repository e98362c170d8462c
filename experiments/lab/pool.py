"""A pool of runs: a config is trained once, whoever asks, in a folder named by what it computes.

    POOL/runs/DIGEST/     config.json, checkpoints/, metrics.csv, eval.json, heldout_rows.npz, ...
    POOL/shared/DIGEST/   rows, references and their scores, which runs link to

A run whose model.init or reference.init is another run of the pool is trained after it. What was
interrupted, by kill -9 too, goes on where it stopped when it is asked for again. What is finished
is not looked at again: after a change of the text itself, use another pool.
"""

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rho1_jax import command_line, files, jsonfile, main
from rho1_jax import config as config_lib
from rho1_jax.data import loader
from rho1_jax.pipeline import models
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import program, sharding
from rho1_jax.training.interruption import Interrupted
from rho1_jax.training.metrics import duration

SHARED_STAGES = ("prepare", "reference", "score")
OWN_STAGES = ("train", "evaluate")
ROWS_FILE = "heldout_rows.npz"  # written last: a run that has it is finished


def command(run: Callable[[Sequence[str]], None], argv: Sequence[str], doc: str | None) -> int:
    """The exit status of a command that trains runs of a pool (command_line.run)."""
    try:
        return command_line.run(run, argv, doc)
    except (Interrupted, KeyboardInterrupt):
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        return 130


def place(pool: Path, config: ConfigDict) -> Path:
    """The folder of this config's run, with the config in it; nothing is trained yet.

    Two configs share a folder if they differ in nothing but the devices and how often they log.
    """
    config_lib.validate(config)
    plain = json.loads(config.to_json_best_effort())
    decides = {key: value for key, value in plain.items() if key not in ("mesh", "log_every")}
    folder = pool.resolve() / "runs" / _digest(decides)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        jsonfile.write(folder / "config.json", plain)
    return folder


def config_of(folder: Path) -> ConfigDict:
    """The config that `place` put there."""
    return ConfigDict(jsonfile.read(folder / "config.json")).lock()


def finished(folder: Path) -> bool:
    return (folder / ROWS_FILE).exists()


def cores() -> list[int]:
    """The processor cores this process may use; one where the system does not tell (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def run_all(folders: Iterable[Path], *, workers: int = 1) -> None:
    """Train what is not finished, and before it the runs it starts from; a line for each.

    workers: processes, each on a core of its own; with 1 all happens in this process.
    """
    todo = unfinished(folders)
    start = time.monotonic()
    ended = in_processes(todo, workers) if workers > 1 else map(train, todo)
    for done, folder in enumerate(ended, 1):
        left = (time.monotonic() - start) / done * (len(todo) - done)
        print(f"run {done} of {len(todo)} is finished ({folder.name}), {duration(left)} left")


def unfinished(folders: Iterable[Path]) -> list[Path]:
    """The runs still to be trained, each once and after those it starts from."""
    found: dict[Path, None] = {}

    def add(folder: Path) -> None:
        for before in _needs(folder):
            add(before)
        found.setdefault(folder)

    for folder in folders:
        add(folder)
    return sorted((folder for folder in found if not finished(folder)), key=_depth)


def in_processes(
    todo: Sequence[Path], workers: int, tick: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yields the runs as they end; one begins when those it needs have ended.

    tick: called about once a second. What a run prints goes to log.txt in its folder.
    """
    context = multiprocessing.get_context("spawn")
    own_cores = context.Queue()
    for _, core in zip(range(workers), itertools.cycle(cores()), strict=False):
        own_cores.put(core)
    waiting, running = list(todo), dict[Future, Path]()
    with ProcessPoolExecutor(workers, context, _begin, (own_cores,)) as executor:
        try:
            while waiting or running:
                ready = [folder for folder in waiting if all(map(finished, _needs(folder)))]
                for folder in ready[: workers - len(running)]:
                    running[executor.submit(train_quietly, folder)] = folder
                    waiting.remove(folder)
                ended, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                tick()
                for future in ended:
                    future.result()
                    yield running.pop(future)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def train_quietly(folder: Path) -> Path:
    """`train`, with what it prints in the run's log.txt."""
    with (folder / "log.txt").open("a", buffering=1) as log:  # noqa: SIM117
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return train(folder)


def train(folder: Path) -> Path:
    """One run, from what its folder and the shared ones already hold. Raises what main.run does."""
    with _locked(folder):  # two commands, or two jobs on a cluster, may ask for the same run
        if finished(folder):
            return folder
        config, shared = config_of(folder), _link_shared(folder)
        program.keep_compiled(folder.parent.parent)  # runs differ little: most is there
        with contextlib.ExitStack() as locks:
            for place in shared:
                locks.enter_context(_locked(place))
            main.run(config, folder, SHARED_STAGES)
        main.run(config, folder, OWN_STAGES)
        _write_heldout_rows(config, folder)
    return folder


def heldout_rows(folder: Path) -> dict[str, np.ndarray]:
    """domain -> [rows, 2]: the finished policy's nats, and the targets, of each held-out row."""
    with np.load(folder / ROWS_FILE) as f:
        return dict(f)


def _link_shared(folder: Path) -> list[Path]:
    """Links rows, reference and scores to where runs share them; returns those places."""
    config = config_of(folder)
    plain = json.loads(config.to_json_best_effort())
    data, shared = plain["data"], folder.parent.parent / "shared"
    sources = {
        name: {k: v for k, v in source.items() if k != "weight"}
        for name, source in (data["corpus"] | data["clean"]).items()
    }
    init = plain["model"]["init"] if plain["tokenizer"]["source"] == "init" else ""
    rows = {"sources": sources, "tokenizer": plain["tokenizer"], "init": init}
    rows |= {key: data[key] for key in ("root", "seq_len")}
    places = {"data": shared / _digest(rows) / "data"}
    if config_lib.needs_reference(config):
        keys = ("seed", "model", "reference", "score")
        reference = rows | {key: plain[key] for key in keys}
        reference |= {key: data[key] for key in ("clean", "separate_documents")}
        if not config.score.entropy:
            reference["fields"] = plain["select"]
        for name in ("reference", "scores"):
            places[name] = shared / _digest(reference) / name
    for name, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(os.path.relpath(place, folder))
    return sorted({place.parent for place in places.values()})


def _depth(folder: Path) -> int:
    return 1 + max(map(_depth, _needs(folder)), default=0)


def _needs(folder: Path) -> list[Path]:
    config = config_of(folder)
    named = (Path(config.model.init), Path(config.reference.init))
    return [path for path in named if path.parent == folder.parent]


def _begin(own_cores: Any) -> None:
    """A core of its own: one run on each of two cores is faster than each in turn on both."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {own_cores.get()})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its processes, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that dies."""
    with (place / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _write_heldout_rows(config: ConfigDict, folder: Path) -> None:
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        run = Workspace(config, folder, mesh)
        params, shape = models.policy(run)
        chunk_tokens = config.loss_chunk_tokens
        loss_fn = program.score_fn(shape, mesh, chunk_tokens=chunk_tokens, entropy=False)
        found: Mapping[str, np.ndarray] = {
            name: np.concatenate(
                [
                    _sums(loss_fn(params, run.put(batch))["ref_loss"], batch)
                    for batch in loader.ordered_batches(
                        rows,
                        batch_size=config.score.batch_size,
                        stop_row=min(config.eval.rows, len(rows)),
                    )
                ]
            )
            for name, rows in run.heldout_rows().items()
        }
    with files.replacing(folder / ROWS_FILE) as stream:
        np.savez(stream, **found)  # type: ignore[arg-type]


def _sums(loss: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    real = batch["row"] >= 0
    nats = np.where(batch["valid"], np.asarray(loss, np.float64), 0).sum(1)
    return np.stack([nats, batch["valid"].sum(1)], 1)[real]


def _digest(value: Any) -> str:
    return jsonfile.digest(value)[:16]
