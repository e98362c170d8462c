"""What every experiment writes: results.csv, figures, and summary.md with where they come from."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lab import pool, tables
from experiments.lab.study import Study, flops
from rho1_jax import files, jsonfile
from rho1_jax.analysis import bootstrap, records
from rho1_jax.analysis.bootstrap import Interval
from rho1_jax.models import llama
from rho1_jax.training import checkpoint

# Colour-blind safe (Okabe and Ito).
COLORS = ("#0072B2", "#000000", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
BASELINE = "CLM"
TEMPLATES = Path(__file__).parent / "templates"

Runs = Mapping[tuple[str, int], Path]  # (method, seed) -> the folder of its finished run


def methods(runs: Runs) -> list[str]:
    return list(dict.fromkeys(method for method, _ in runs))


def of(runs: Runs, method: str) -> list[Path]:
    """The runs of a method, by seed."""
    return [folder for (name, _), folder in sorted(runs.items()) if name == method]


def rows(runs: Runs) -> list[dict[str, Any]]:
    """results.csv: one row per method, seed and domain, and the base and reference of each seed."""
    found = []
    for (method, seed), folder in runs.items():
        evals, config = jsonfile.read(folder / "eval.json"), pool.config_of(folder)
        costs = {
            "steps": config.train.steps,
            "tokens": config.train.steps * config.train.batch_size * config.data.seq_len,
            "flops_in_tokens": round(cost(folder) * config.data.seq_len),
        }
        found += _rows(method, seed, evals["policy"], costs | step_means(folder))
        if method == methods(runs)[0]:
            found += _rows("(base)", seed, evals["initial"], {})
            found += _rows("(reference)", seed, evals.get("reference", {}), {})
    return found


def cost(folder: Path) -> float:
    """All FLOPs of a finished run, its reference's too, in rows trained by the policy."""
    config = pool.config_of(folder)
    if not config.reference.init:
        return flops(config)
    policy, reference = (
        llama.flops_per_token(checkpoint.load_model(folder / name)[1], config.data.seq_len)
        for name in ("checkpoints", "reference")
    )
    return flops(config, reference / policy)


def step_means(folder: Path) -> dict[str, float]:
    """Means over the steps: share of tokens selected, and where the truth is known the share of
    useful ones among the selected (precision) and among all."""
    names = ("selected_share", "precision", "useful_share")
    columns = records.read_metrics(folder / "metrics.csv")
    return {name: float(columns[name].mean()) for name in names if np.isfinite(columns[name][0])}


def loss(runs: Runs, method: str, domain: str, minus: str = "") -> Interval:
    """Held-out nats per token of a method, or that minus another's from the same seeds and rows."""
    measured = _stacked(of(runs, method), domain)
    nats, targets = measured[..., 0], measured[0, :, 1]
    if minus:
        nats = nats - _stacked(of(runs, minus), domain)[..., 0]
    return bootstrap.mean_loss(nats, targets)


def speedup(runs: Runs, method: str, domain: str, baseline: str = BASELINE) -> Interval:
    """How many times fewer training tokens reach the last held-out loss of the baseline."""
    base_tokens, base = curves(of(runs, baseline), domain)
    tokens, losses = curves(of(runs, method), domain)
    return bootstrap.tokens_to_baseline(base_tokens, base, tokens, losses)


def curves(folders: Sequence[Path], domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens [points], and held-out losses [runs, points] at these."""
    found = [records.read_heldout(folder / "heldout.csv")[domain] for folder in folders]
    return found[0][0], np.stack([losses for _, losses in found])


def draw_curves(axes: Axes, runs: Runs, domain: str) -> None:
    """Held-out loss over training tokens: the mean over seeds, and a band from least to most.

    The inverse selection may leave the panel, so that the others can be told apart.
    """
    found = {method: curves(of(runs, method), domain) for method in methods(runs)}
    others = [losses for method, (_, losses) in found.items() if method != "inverse selection"]
    low, high = min(map(np.min, others)), max(map(np.max, others))
    for i, (method, (tokens, losses)) in enumerate(found.items()):
        color, style = COLORS[i % len(COLORS)], "-" if i % 2 == 0 else "--"
        axes.plot(tokens / 1e3, losses.mean(0), style, color=color, label=method, lw=1.6)
        axes.fill_between(tokens / 1e3, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
    axes.set(xlabel="training tokens (thousands)", ylabel="held-out loss (nats per token)")
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_title(domain, fontsize=10)


def figure_of_curves(runs: Runs, domains: Sequence[str]) -> Figure:
    """One panel per domain, three in a row, and the methods named beside them."""
    across = min(3, len(domains))
    down = -(-len(domains) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(2.4 + 3.2 * across, 3.3 * down), layout="constrained", squeeze=False
    )
    for axes, domain in zip(panels.flat, domains, strict=False):
        draw_curves(axes, runs, domain)
    for axes in panels.flat[len(domains) :]:
        axes.remove()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def comparison(runs: Runs, domains: Sequence[str], baseline: str = BASELINE) -> str:
    """A Markdown table: one line per method; losses, paired differences, costs, selections."""
    head = ["method", "tokens", "FLOPs / CLM", "selected"]
    for domain in domains:
        head += [f"{domain}, nats per token", f"minus {baseline}"]
    lines = []
    unit = cost(of(runs, baseline)[0])
    for method in methods(runs):
        folders = of(runs, method)
        config = pool.config_of(folders[0])
        means = [step_means(folder) for folder in folders]
        selected = f"{np.mean([m['selected_share'] for m in means]):.0%}"
        if "precision" in means[0] and method != baseline:
            selected += f", {np.mean([m['precision'] for m in means]):.0%} useful"
        n_tokens = config.train.steps * config.train.batch_size * config.data.seq_len
        cells = [method, f"{n_tokens:,}", f"{cost(folders[0]) / unit:.2f}", selected]
        for domain in domains:
            cells.append(said(loss(runs, method, domain)))
            own = method == baseline
            cells.append("" if own else said(loss(runs, method, domain, minus=baseline), sign=True))
        lines.append(cells)
    for name in ("base", "reference"):
        evals = [jsonfile.read(f / "eval.json") for f in of(runs, methods(runs)[0])]
        key = "initial" if name == "base" else name
        if key not in evals[0]:
            continue
        cells = [f"({name})", "", "", ""]
        for domain in domains:
            cells += [f"{np.mean([e[key][domain]['loss'] for e in evals]):.3f}", ""]
        lines.append(cells)
    return tables.markdown(head, lines)


def beside_paper(*lines: tuple[str, str, str]) -> str:
    """A Markdown table of (what, the paper's number, ours)."""
    return tables.markdown(("", "in the paper", "here"), lines)


def differences(runs: Runs, method: str, domains: Sequence[str]) -> str:
    """Held-out loss minus the baseline's on each domain, in one line of text."""
    return ", ".join(
        f"{domain} {said(loss(runs, method, domain, minus=BASELINE), sign=True)}"
        for domain in domains
    )


def said(value: Interval, *, sign: bool = False, digits: int = 3) -> str:
    """Estimate and interval: -0.123 [-0.150, -0.101]."""
    plus = "+" if sign else ""
    estimate = f"{value.estimate:{plus}.{digits}f}"
    if math.isnan(value.low) and math.isnan(value.high):
        return estimate
    return f"{estimate} [{value.low:{plus}.{digits}f}, {value.high:{plus}.{digits}f}]"


def write(
    study: Study, runs: Mapping[Any, Path], found: Sequence[Mapping[str, Any]], text: str
) -> None:
    """results.csv and summary.md: `text`, then how and on what it was measured."""
    study.out.mkdir(parents=True, exist_ok=True)
    tables.write(study.out / "results.csv", found)
    summary = f"{text.strip()}\n\n{_provenance(study, runs)}\n"
    files.write(study.out / "summary.md", summary)
    print(summary, flush=True)


def save(study: Study, figure: Figure, name: str = "figure.png") -> str:
    """Saves a figure; returns the Markdown that shows it."""
    study.out.mkdir(parents=True, exist_ok=True)
    with files.replacing(study.out / name) as stream:
        figure.savefig(stream, dpi=150)
    plt.close(figure)
    return f"![{study.name}]({name})"


def _provenance(study: Study, runs: Mapping[Any, Path]) -> str:
    there = jsonfile.read(next(iter(runs.values())) / "environment.json")
    versions = ", ".join(f"{name} {version}" for name, version in there["versions"].items())
    data = f" --data={Path(study.data).name}" if study.data else ""
    overrides = "".join(f" --config.{override}" for override in study.overrides)
    options = f"--scale={study.scale} --seeds={study.seeds}{data}{overrides}"
    return (
        f"`python -m experiments.{study.name} {options}`, "
        f"seeds 0 to {study.seeds - 1}, {there['started'][:10]}, {there['cpu_cores']} CPU cores, "
        f"{there['devices']}, Python {there['python']}, {versions}. Intervals: 95 %, paired "
        "by seed and held-out row: Student's t over the seeds, and what the rows add."
    )


def _rows(method: str, seed: int, evals: Mapping, more: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"method": method, "seed": seed, "domain": domain, "loss": r["loss"],
         "bits_per_byte": r["bits_per_byte"], **more}
        for domain, r in evals.items()
    ]  # fmt: skip


def _stacked(folders: Sequence[Path], domain: str) -> np.ndarray:
    """[seeds, rows, 2]: nats and targets."""
    return np.stack([pool.heldout_rows(folder)[domain] for folder in folders])
