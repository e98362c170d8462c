"""A sweep of one config: the rows that its file's `sweep` names, a live table, a results table.

    python -m experiments.sweep --config=configs/math.py --sweep=select_ratio [--out=DIR]
        [--workers=N] [--cluster=slurm] [--slurm.KEY=VALUE] [--config.a.b=VALUE]

Rows are runs of a pool (pool.py) in --out: finished ones are skipped, and after an interruption the
same command goes on. They run on this machine, --workers of them at a time (one on each core; with
an accelerator say --workers=1). With --cluster=slurm each is a job, through `submitit` (pip install
submitit), with the parameters --slurm.partition=NAME and so on; all machines must see the folder.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.lab import pool, tables
from rho1_jax import config_file, files, jsonfile
from rho1_jax.errors import InputError

# test: submitit's own processes on this machine
OPTIONS = {"sweep": "", "out": Path, "workers": int, "cluster": ("local", "slurm", "test")}
SLURM = "--slurm."
Tick = Callable[[], None]


def run(argv: Sequence[str]) -> None:
    """Run what the command line asks for, then write sweep.md. InputError for bad input."""
    slurm = [a for a in argv if a.startswith(SLURM)]
    needs = {"sweep": "name one of the sweeps of the config's file"}
    found = config_file.parse([a for a in argv if a not in slurm], OPTIONS, required=needs)
    out = found.out or Path("runs/sweeps") / found.sweep
    rows = {
        name: pool.place(out, changed(found.config, changes))
        for name, changes in sweep_of(found.named.partition(":")[0])(found.sweep)
    }
    todo = pool.unfinished(rows.values())
    table = Table(rows)
    if found.cluster == "local":
        ended = pool.in_processes(todo, found.workers or len(pool.cores()), table.show)
    else:
        keys = dict(a.removeprefix(SLURM).split("=", 1) for a in slurm if "=" in a)
        ended = on_cluster(todo, found.cluster, out / "jobs", keys, table.show)
    for _ in ended:
        table.show()
    files.write(out / "sweep.md", table.text())
    print(f"{table.text()}{out / 'sweep.md'}")


def sweep_of(file: str) -> Callable[[str], Iterator[tuple[str, dict[str, Any]]]]:
    """The function `sweep` of a config file: name -> rows of (name, changed keys)."""
    module = config_file.module(file)
    if not hasattr(module, "sweep"):
        raise InputError(f"{file} has no function sweep(name): write one beside get_config.")
    return module.sweep


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    c = ConfigDict(config.to_dict()).lock()
    c.update_from_flattened_dict(dict(changes))
    return c


def on_cluster(
    todo: Sequence[Path], cluster: str, folder: Path, keys: Mapping[str, str], tick: Tick
) -> Iterator[Path]:
    """Submits a job for each run and yields them as they end; jobs outlive this process.

    A job that is submitted twice waits for the first, and then has nothing to do.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("--cluster needs submitit: pip install submitit.") from error
    executor = submitit.AutoExecutor(folder, cluster="local" if cluster == "test" else cluster)
    executor.update_parameters(
        name="rho1_jax", **{f"slurm_{key}": value for key, value in keys.items()}
    )
    jobs = {executor.submit(pool.train_quietly, run): run for run in todo}
    while jobs:
        for job in [job for job in jobs if job.done()]:
            job.result()  # raises what the job raised
            yield jobs.pop(job)
        tick()
        time.sleep(1)


class Table:
    """What each row is doing, redrawn in place on a terminal, else whenever it changes."""

    def __init__(self, rows: Mapping[str, Path]):
        self._rows, self._drawn = rows, ""

    def show(self) -> None:
        text = self.text()
        if text == self._drawn:
            return
        if self._drawn and sys.stdout.isatty():
            print(f"\033[{self._drawn.count(chr(10))}F\033[J", end="")
        print(text, end="", flush=True)
        self._drawn = text

    def text(self) -> str:
        """Markdown: name, state, held-out losses of the finished."""
        head, lines = ["row", "state", "held-out loss, nats per token"], []
        for name, folder in self._rows.items():
            lines.append([name, _state(folder), _losses(folder)])
        return tables.markdown(head, lines)


def _state(folder: Path) -> str:
    if pool.finished(folder):
        return "finished"
    metrics = folder / "metrics.csv"
    if not metrics.exists():
        return "waiting" if not (folder / "log.txt").exists() else "preparing"
    last = metrics.read_text().rsplit("\n", 2)[-2].split(",")[0]
    return f"step {last} of {pool.config_of(folder).train.steps}" if last.isdigit() else "training"


def _losses(folder: Path) -> str:
    if not pool.finished(folder):
        return ""
    policy = jsonfile.read(folder / "eval.json")["policy"]
    return ", ".join(f"{domain} {found['loss']:.3f}" for domain, found in policy.items())


if __name__ == "__main__":
    sys.exit(pool.command(run, sys.argv, __doc__))
