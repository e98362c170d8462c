"""What a run says of itself: a CSV line, TensorBoard scalars and one progress line per step."""

import csv
import functools
import io
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rho1_jax import files
from rho1_jax.errors import InputError

STEP_COLUMNS = (
    "step", "tokens", "seconds", "loss", "loss_selected", "loss_unselected", "ref_loss",
    "ref_loss_selected", "ref_loss_unselected", "selected_share", "precision", "useful_share",
    "grad_norm", "learning_rate", "tokens_per_second", "matmul_utilization", "input_wait", "bad",
    "empty",
)  # fmt: skip
HELDOUT_COLUMNS = ("step", "tokens", "domain", "loss", "bits_per_byte")

_log = logging.getLogger("rho1_jax")


class MetricsLog:
    """Writes metrics.csv, heldout.csv and tensorboard/ in a folder, and logs progress.

    Reopened at `first_step`, it drops what an interrupted run wrote after that step.

    matmul_utilization: the least FLOPs of the step over those of plain matrix products in the same
    time on the same devices (`measured_peak`). Against the vendor's peak, as MFU is usually given,
    it is lower by the share of it that such products reach.
    later_flops: of the stages that follow, to say when all are done.
    domains: those whose share of selected tokens has a column of its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        first_step: int,
        steps: int,
        flops_per_token: float,
        peak_flops: float,
        every: int,
        later_flops: float = 0.0,
        domains: Iterable[str] = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._name, self._first, self._steps, self._every = name, first_step, steps, every
        self._flops_per_token, self._later_flops = flops_per_token, later_flops
        self._peak_flops = peak_flops
        columns = (*STEP_COLUMNS, *(f"selected_share/{domain}" for domain in domains))
        self._metrics = _CsvFile(folder / "metrics.csv", columns, first_step)
        self._heldout = _CsvFile(folder / "heldout.csv", HELDOUT_COLUMNS, first_step)
        import tensorboardX  # brings torch, where that is installed: seconds

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

    def step(self, step: int, sums: Mapping[str, Any], *, always: bool = False) -> dict[str, float]:
        """Take note of a step from its sums and counts (slm/step.py), and return them; blocks until
        they are there, and reads them in one transfer.

        Every `every`-th step is recorded, the last one, and with `always` this one: a step that is
        saved must be, or a resumed run would lose count of the tokens.
        """
        values = {name: float(x) for name, x in jax.device_get(dict(sums)).items()}
        now = time.perf_counter()
        took, self._clock = now - self._clock, now
        self._tokens += values["tokens"]
        self._seconds += took
        if step % self._every and step != self._steps and not always:
            return values
        rate = values["tokens"] / took
        row = {
            "step": step,
            "tokens": int(self._tokens),
            "seconds": self._seconds,
            **averages(values),
            "learning_rate": values["learning_rate"],
            "tokens_per_second": rate,
            "matmul_utilization": rate * self._flops_per_token / self._peak_flops,
            "input_wait": self._waited / took,  # share of the step's time, for the latest batch
            "bad": int(values["bad"]),
            "empty": int(values["empty"]),
        }
        self._metrics.write(row)
        for column, value in row.items():
            if column != "step":
                self._board.add_scalar(f"{self._name}/{column}", value, step)
        _log.info("%s", self._line(row))
        return values

    def heldout(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Record held-out results, domain -> {"loss", "bits_per_byte", ...}."""
        for domain, result in results.items():
            losses = {name: result[name] for name in ("loss", "bits_per_byte")}
            self._heldout.write(
                {"step": step, "tokens": int(self._tokens), "domain": domain, **losses}
            )
            self._board.add_scalar(f"heldout/{domain}", result["loss"], step)
        parts = [f"{d} {r['loss']:.3f} ({r['bits_per_byte']:.3f} bpb)" for d, r in results.items()]
        _log.info("%s held out at step %d: %s", self._name, step, "  ".join(parts))

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
        parts = [f"{self._name} {row['step']}/{self._steps}"]
        if "loss" in row:
            parts.append(f"loss {row['loss']:.3f}")
        if "loss_selected" in row and "loss_unselected" in row:
            parts.append(
                f"selected {row['loss_selected']:.3f}  unselected {row['loss_unselected']:.3f}"
            )
            if "precision" in row:
                parts.append(f"precision {row['precision']:.0%}")
        rate = row["tokens_per_second"]
        parts += [f"{rate:,.0f} tok/s", f"matmul {row['matmul_utilization']:.0%}"]
        eta = f"ETA {duration(left)}"
        if self._later_flops and rate:
            later = self._later_flops / (rate * self._flops_per_token)
            eta += f" (all stages {duration(left + later)})"
        return "  ".join([*parts, eta])


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
    for name, count in sums.items():
        if name.startswith("tokens/") and count:
            domain = name.removeprefix("tokens/")
            out[f"selected_share/{domain}"] = sums[f"selected/{domain}"] / count
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
    """An append-only CSV that is flushed line by line and cut back to `first_step` when reopened.

    It has a checksum (files.seal) while nobody writes it. InputError if what is there is damaged.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], first_step: int):
        kept = _rows_until(path, first_step) if first_step > 0 and path.exists() else []
        files.unseal(path)
        with files.replacing(path) as stream:
            stream.write(_lines(columns, kept, header=True))
        self._path, self._columns, self._file = path, columns, path.open("ab")
        self._last = kept[-1] if kept else {}

    def last(self, column: str) -> float:
        return float(self._last.get(column, 0))

    def write(self, row: Mapping[str, Any]) -> None:
        said = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self._file.write(_lines(self._columns, [said]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        files.seal(self._path)


def _lines(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, header: bool = False
) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    """The lines up to a step; a last one that a crash or a full disk cut short is none."""
    advice = "put back a copy of it, or delete it to go on without its lines"
    files.require_sealed(path, advice)
    rows = []
    try:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1].decode()
        for row in csv.DictReader(io.StringIO(whole, newline=""), strict=True):
            if None in row or None in row.values():
                raise ValueError("a line has other cells than the header")
            float(row["tokens"])
            if int(row["step"]) <= step:
                rows.append(row)
    except (ValueError, KeyError, csv.Error) as error:
        raise InputError(f"{path} is damaged ({error}): {advice}.") from error
    return rows
