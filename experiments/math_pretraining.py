"""Does selecting tokens help, and is it the selection? SLM and its controls (Table 1, Figure 1).

    python -m experiments.math_pretraining --out=runs/math_pretraining [--seeds=3]

Trains, on the embedded corpus of configs/math.py and for each seed: SLM; CLM; a random and the
inverse selection of as many tokens; CLM on the corpus mixed with the reference's clean text; and
CLM for as many FLOPs as SLM spent in all (reference, scoring and training). The reference itself is
shown too. Finished runs are not done again. Writes results.csv, summary.md, heldout.png to --out.
"""

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags
from matplotlib.ticker import ScalarFormatter
from ml_collections import ConfigDict
from scipy import stats

from configs import math as math_config
from rho1_jax import main

CORPUS, TARGET = "pages", "problems"
METHODS: dict[str, dict[str, Any]] = {
    "SLM": {},
    "CLM": {"select.score": "all", "select.ratio": 1.0},
    "CLM, matched FLOPs": {"select.score": "all", "select.ratio": 1.0},
    "CLM on corpus + clean": {"select.score": "all", "select.ratio": 1.0},
    "random selection": {"select.score": "random"},
    "inverse selection": {"select.score": "inverse"},
}
# Colour-blind safe (Okabe and Ito), one for each method.
LINES = (("#0072B2", "-"), ("#000000", "-"), ("#000000", ":"), ("#009E73", "-"), ("#E69F00", "-"),
         ("#D55E00", "--"))  # fmt: skip
COLUMNS = ("method", "seed", "steps", "tokens", "relative_flops", "domain", "loss",
           "bits_per_byte", "precision", "useful_share")  # fmt: skip


def method_config(method: str, seed: int) -> ConfigDict:
    """configs/math.py as `method` changes it."""
    c = ConfigDict(math_config.get_config().to_dict())
    c.update_from_flattened_dict({"seed": seed, **METHODS[method]})
    if method == "CLM on corpus + clean":
        # As much clean text as the reference saw, within the same number of tokens.
        clean = c.reference.steps * c.reference.batch_size
        c.data.corpus[CORPUS].weight = float(c.train.steps * c.train.batch_size)
        c.data.corpus[TARGET] = ConfigDict(c.data.clean[TARGET].to_dict())
        c.data.corpus[TARGET].weight = float(clean)
    if method == "CLM, matched FLOPs":
        c.train.steps = round(c.train.steps * slm_flops(c))
    return c


def slm_flops(c: ConfigDict) -> float:
    """FLOPs of reference training, scoring and SLM training, over those of CLM's training.

    Same model throughout: a forward pass is a third of a training step, and every row is scored
    once (rows seen again are not scored again; here none is).
    """
    reference = c.reference.steps * c.reference.batch_size
    corpus = c.train.steps * c.train.batch_size
    return (reference + corpus / 3 + corpus) / corpus


def run_all(out: Path, seeds: Iterable[int]) -> None:
    """Every method and seed, sharing rows, and per seed the reference and its scores."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for method in METHODS:
            folder = run_folder(out, method, seed)
            _link(folder / "data", out / "data")
            if method == "inverse selection":
                for name in ("reference", "scores"):
                    _link(folder / name, run_folder(out, "SLM", seed) / name)
            print(f"== {method}, seed {seed}", flush=True)
            main.run(method_config(method, seed), folder)


def run_folder(out: Path, method: str, seed: int) -> Path:
    return out / f"seed{seed}" / method.replace(", ", "_").replace(" ", "_").replace("+", "and")


def results(out: Path, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """One row per method, seed and domain; the initial and the reference model count as methods."""
    rows = []
    for seed in seeds:
        for method in METHODS:
            folder = run_folder(out, method, seed)
            evals = json.loads((folder / "eval.json").read_text())
            rows += _rows(method, seed, evals["policy"], _costs(method, seed) | _selected(folder))
            if method == "SLM":
                rows += _rows("(initial model)", seed, evals["initial"], {})
                rows += _rows("(reference model)", seed, evals["reference"], {})
    return rows


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % Student t interval (nan for a single value)."""
    x = np.array(list(values), float)
    if len(x) < 2:
        return float(x.mean()), math.nan
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(half)


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: means and intervals over seeds, and differences to CLM paired by seed."""
    clm = {r["seed"]: r["loss"] for r in _where(rows, method="CLM", domain=TARGET)}
    lines = [
        f"| model | tokens | FLOPs / CLM | held-out {TARGET}, nats per token | minus CLM, paired "
        f"| held-out {CORPUS} | precision of the selection |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        target = _where(rows, method=method, domain=TARGET)
        corpus = _where(rows, method=method, domain=CORPUS)
        first = target[0]
        cells = [
            method,
            f"{first['tokens']:,}" if "tokens" in first else "",
            f"{first['relative_flops']:.2f}" if "relative_flops" in first else "",
            _plus_minus(r["loss"] for r in target),
            "" if method == "CLM" else _plus_minus(r["loss"] - clm[r["seed"]] for r in target),
            _plus_minus(r["loss"] for r in corpus),
            _plus_minus(r["precision"] for r in target) if "precision" in first else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(out: Path, seeds: Iterable[int]) -> None:
    """Held-out loss of the target over training tokens: mean over seeds, band from min to max."""
    fig, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for method, (color, style) in zip(METHODS, LINES, strict=True):
        curves = [_heldout(run_folder(out, method, seed)) for seed in seeds]
        tokens, loss = curves[0][0] / 1e3, np.stack([curve[1] for curve in curves])
        axes.plot(tokens, loss.mean(0), style, color=color, label=method)
        axes.fill_between(tokens, loss.min(0), loss.max(0), color=color, alpha=0.2, lw=0)
    axes.set(
        xlabel="training tokens (thousands)", ylabel=f"held-out loss on {TARGET} (nats per token)"
    )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    fig.legend(loc="outside right upper", frameon=False, fontsize=8)
    fig.savefig(out / "heldout.png", dpi=130)


def _costs(method: str, seed: int) -> dict[str, Any]:
    c = method_config(method, seed)
    matched = method in ("SLM", "inverse selection", "CLM, matched FLOPs")
    return {
        "steps": c.train.steps,
        "tokens": c.train.steps * c.train.batch_size * c.data.seq_len,
        "relative_flops": slm_flops(method_config("SLM", seed)) if matched else 1.0,
    }


def _selected(folder: Path) -> dict[str, float]:
    """Mean over the steps: share of the selected tokens that are useful, and of all tokens."""
    with (folder / "metrics.csv").open(newline="") as f:
        steps = list(csv.DictReader(f))
    return {
        name: float(np.mean([float(step[name]) for step in steps]))
        for name in ("precision", "useful_share")
    }


def _heldout(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with (folder / "heldout.csv").open(newline="") as f:
        rows = _where(list(csv.DictReader(f)), domain=TARGET)
    tokens, loss = (np.array([float(r[name]) for r in rows]) for name in ("tokens", "loss"))
    return tokens, loss


def _rows(method: str, seed: int, evals: dict, more: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"method": method, "seed": seed, "domain": domain, "loss": r["loss"],
         "bits_per_byte": r["bits_per_byte"], **more}
        for domain, r in evals.items()
    ]  # fmt: skip


def _where(rows: list[dict], **wanted: str) -> list[dict]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def _plus_minus(values: Iterable[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.symlink_to(target.resolve())


def run_experiment(_argv: list[str]) -> None:
    out, seeds = Path(flags.FLAGS.out), range(flags.FLAGS.seeds)
    run_all(out, seeds)
    rows = results(out, seeds)
    with (out / "results.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (out / "summary.md").write_text(summary(rows))
    figure(out, seeds)
    print((out / "summary.md").read_text())


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/math_pretraining", "folder for runs and results")
    flags.DEFINE_integer("seeds", 3, "seeds 0, 1, ...")
    app.run(run_experiment)
