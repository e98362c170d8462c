"""Stage 6: report.html, made anew from what the run's folder holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax import files
from rho1_jax.errors import InputError
from rho1_jax.evaluation import selected
from rho1_jax.pipeline.workspace import BASELINE, Workspace, say
from rho1_jax.training import hosts

PASSAGES = 4  # held-out rows shown in full


def check(ws: Workspace) -> None:
    """InputError if the run to compare with is none."""
    compare = ws.options.compare
    if compare and not (Path(compare) / "eval.json").exists():
        raise InputError(
            f"--compare={compare} holds no evaluated run: give the folder of a finished one."
        )


def run(ws: Workspace) -> None:
    hosts.once(lambda: _write(ws))


def _write(ws: Workspace) -> None:
    from rho1_jax.analysis import report as page  # brings matplotlib: half a second

    if not (ws.folder / "samples.npz").exists():
        raise InputError(f"{ws.folder} holds no evaluation yet: run --stages=evaluate first.")
    sample = selected.load_sample(ws.folder / "samples.npz")
    files.unseal(ws.folder / "report.html")
    n = len(sample["tokens"])
    shown = np.linspace(0, n - 1, min(PASSAGES, n)).round().astype(int)
    path = page.write(
        ws.folder,
        passages=[_passage(ws, sample, row) for row in shown.tolist()],
        histogram=_histogram(sample, tuple(ws.selection.own_ratios)),
        compare=ws.folder / BASELINE if ws.options.baseline else ws.options.compare or None,
    )
    files.seal(path)
    say("report", str(path))


def _histogram(sample: Mapping[str, np.ndarray], apart: tuple[int, ...]) -> dict[str, Any] | None:
    """Of the tokens that compete with each other; apart: domains with a ratio of their own."""
    if "score" not in sample:
        return None
    valid = sample["valid"]
    if apart:
        valid = valid & ~np.isin(sample["domain"], apart)[:, None]
    kept = sample["score"][sample["selected"] & valid]
    if not kept.size:
        return None
    return {
        "scores": sample["score"][valid],
        "threshold": float(kept.min()),
        "useful": sample["useful"][valid] if "useful" in sample else None,
    }


def _passage(ws: Workspace, sample: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    """One sampled row as the report shows it: its targets, as text."""
    valid = sample["valid"][row]
    columns = {
        name: sample[name][row][valid] if name in sample else None
        for name in ("loss", "ref_loss", "score", "selected")
    }
    ids = sample["tokens"][row, 1:][valid]
    title = f"{'Training' if ws.given_scores else 'Held-out'} row {row}"
    return {"title": title, "pieces": ws.tokenizer.pieces(ids), **columns}
