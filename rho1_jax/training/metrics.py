"""What a run says of itself: a CSV line, TensorBoard scalars and one progress line per step."""

import csv
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tensorboardX

STEP_COLUMNS = (
    "step", "tokens", "seconds", "loss", "loss_selected", "loss_unselected", "ref_loss",
    "ref_loss_selected", "ref_loss_unselected", "selected_share", "precision", "useful_share",
    "grad_norm", "learning_rate", "tokens_per_second", "mfu", "input_wait",
)  # fmt: skip
HELDOUT_COLUMNS = ("step", "tokens", "domain", "loss", "bits_per_byte")


class MetricsLog:
    """Writes metrics.csv, heldout.csv and tensorboard/ in a folder, and prints progress.

    Reopened at `first_step`, it drops what an interrupted run wrote after that step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        first_step: int,
        steps: int,
        learning_rate: optax.Schedule,
        flops_per_token: float,
        peak_flops: float,
        every: int,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._name, self._first, self._steps, self._every = name, first_step, steps, every
        self._learning_rate = learning_rate
        self._mfu_of_rate = flops_per_token / peak_flops
        self._metrics = _CsvFile(folder / "metrics.csv", STEP_COLUMNS, first_step)
        self._heldout = _CsvFile(folder / "heldout.csv", HELDOUT_COLUMNS, first_step)
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._tokens, self._seconds = self._metrics.last("tokens"), self._metrics.last("seconds")
        self._clock = time.perf_counter()
        self._started, self._waited = self._clock, 0.0

    def restart_clock(self) -> None:
        """Leave what happened since the last step (evaluation, saving) out of the rate."""
        self._clock = time.perf_counter()

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, taking note of the seconds that each was waited for."""
        source = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(source, None)
            self._waited = time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def step(self, step: int, sums: Mapping[str, Any], *, always: bool = False) -> None:
        """Take note of a step from its sums and counts (slm/step.py); blocks until they are there.

        Every `every`-th step is recorded, the last one, and with `always` this one: a step that is
        saved must be, or a resumed run would lose count of the tokens.
        """
        values = {name: float(x) for name, x in sums.items()}
        now = time.perf_counter()
        took, self._clock = now - self._clock, now
        self._tokens += values["tokens"]
        self._seconds += took
        rate = values["tokens"] / took
        row = {
            "step": step,
            "tokens": int(self._tokens),
            "seconds": self._seconds,
            **averages(values),
            "learning_rate": float(self._learning_rate(step - 1)),
            "tokens_per_second": rate,
            "mfu": rate * self._mfu_of_rate,
            "input_wait": self._waited / took,  # share of the step's time, for the latest batch
        }
        if step % self._every and step != self._steps and not always:
            return
        self._metrics.write(row)
        for column, value in row.items():
            if column != "step":
                self._board.add_scalar(f"{self._name}/{column}", value, step)
        print(self._line(row), flush=True)

    def heldout(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Record held-out results, domain -> {"loss", "bits_per_byte", ...}."""
        for domain, result in results.items():
            losses = {name: result[name] for name in ("loss", "bits_per_byte")}
            self._heldout.write(
                {"step": step, "tokens": int(self._tokens), "domain": domain, **losses}
            )
            self._board.add_scalar(f"heldout/{domain}", result["loss"], step)
        parts = [f"{d} {r['loss']:.3f} ({r['bits_per_byte']:.3f} bpb)" for d, r in results.items()]
        print(f"{self._name} held out at step {step}: {'  '.join(parts)}", flush=True)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_exc) -> None:
        self._metrics.close()
        self._heldout.close()
        self._board.close()

    def _line(self, row: Mapping[str, Any]) -> str:
        done = row["step"] - self._first
        elapsed = time.perf_counter() - self._started
        left = elapsed / done * (self._steps - row["step"])
        parts = [f"{self._name} {row['step']}/{self._steps}", f"loss {row['loss']:.3f}"]
        if row["selected_share"] < 1:
            parts.append(
                f"selected {row['loss_selected']:.3f}  unselected {row['loss_unselected']:.3f}"
            )
        if "precision" in row and row["selected_share"] < 1:
            parts.append(f"precision {row['precision']:.0%}")
        parts += [f"{row['tokens_per_second']:,.0f} tok/s", f"MFU {row['mfu']:.0%}"]
        return "  ".join([*parts, f"ETA {duration(left)}"])


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token means and shares from a step's sums; what has no tokens is left out."""
    n, k = sums["tokens"], sums["selected"]
    out = {"selected_share": k / max(n, 1), "grad_norm": sums["grad_norm"]}
    for name in ("loss", "ref_loss"):
        if name not in sums:
            continue
        total, selected = sums[name], sums[f"{name}_selected"]
        for suffix, part, count in (
            ("", total, n), ("_selected", selected, k), ("_unselected", total - selected, n - k),
        ):  # fmt: skip
            if count:
                out[name + suffix] = part / count
    if "useful" in sums:
        out["useful_share"] = sums["useful"] / max(n, 1)
        out["precision"] = sums["selected_useful"] / max(k, 1)
    return out


@functools.cache  # it takes half a second, and a process may train many small models
def measured_peak(dtype: str) -> float:
    """FLOP/s of a large square matmul on all devices together: what MFU is a share of."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    matmul = jax.jit(lambda a: a @ a)
    matmul(x).block_until_ready()
    best = min(_seconds_of(lambda: matmul(x).block_until_ready()) for _ in range(5))
    simulated = jax.default_backend() == "cpu"  # simulated CPU devices share the same cores
    return 2 * size**3 / best * (1 if simulated else jax.device_count())


def duration(seconds: float) -> str:
    """1h02m, 3m20s or 12s."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def _seconds_of(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _CsvFile:
    """An append-only CSV that is flushed line by line and cut back to `first_step` when
    reopened."""

    def __init__(self, path: Path, columns: tuple[str, ...], first_step: int):
        kept = [row for row in _read(path) if int(row["step"]) <= first_step and first_step > 0]
        draft = path.with_name(path.name + ".draft")
        with draft.open("w", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(kept)
        draft.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._last = kept[-1] if kept else {}

    def last(self, column: str) -> float:
        return float(self._last.get(column, 0))

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        )
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as f:
        # A line cut short by a crash has no last column.
        return [row for row in csv.DictReader(f) if row["step"] and None not in row.values()]
