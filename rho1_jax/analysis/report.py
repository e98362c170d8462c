"""report.html of a run: what was run, what it measured, and what it selected, on one page.

What the run's folder lacks is left out with a sentence; what is broken is an InputError. Every
sentence of the page is made from the folder's numbers and claims no more than they say.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax.analysis import baseline, figures, page, records
from rho1_jax.analysis.figures import short_count
from rho1_jax.analysis.page import Chart
from rho1_jax.analysis.records import MODELS, SUBSETS, listed, losses
from rho1_jax.training.metrics import duration

UNITLESS = ("random", "combined", "score", "diversity", "utility")


def write(
    workdir: str | Path,
    *,
    passages: Sequence[Mapping[str, Any]],
    histogram: Mapping[str, Any] | None,
    out: str | Path | None = None,
    compare: str | Path | None = None,
) -> Path:
    """Writes the run's report to `out` (by default workdir/report.html) and returns its path.

    Args: passages with the keys pieces, loss, ref_loss, score, selected (see `page.passage`) and
    title; histogram with scores [n], threshold, and useful [n] or None; without it, that section is
    left out; compare: the folder of a baseline's run, shown beside this one on the first screen.
    Raises: InputError naming the file (and line) if metrics.csv is missing, or any file is broken,
    or if the baseline has nothing to compare.
    """
    folder = Path(workdir)
    metrics = records.read_metrics(folder / "metrics.csv")
    heldout = records.read_heldout(folder / "heldout.csv")
    evals = records.read_eval(folder / "eval.json")
    config = records.read_json(folder / "config.json")
    environment = records.read_json(folder / "environment.json")
    keys = ("pieces", "loss", "ref_loss", "score", "selected")
    target = Path(out) if out else folder / "report.html"
    page.write(
        target,
        "report.html",
        title=f"Run {folder.resolve().name}",
        method=records.method(evals),
        result=_result(evals),
        comparison=baseline.compare(folder, Path(compare)) if compare else None,
        headline=_headline(metrics),
        training=_training(metrics),
        heldout=_heldout(heldout, evals),
        units={"loss": "nats per token", "bits_per_byte": "bits per byte"},
        models={name: evals[name] for name in MODELS if evals.get(name)},
        domains=list(dict.fromkeys(d for name in MODELS for d in evals.get(name, {}))),
        tasks=[_task(name, values) for name, values in evals.get("tasks", {}).items()],
        scores=_scores(histogram, evals) if histogram else None,
        precision=_precision(evals),
        passages=[page.passage(*(p[key] for key in keys), title=p["title"]) for p in passages],
        environment=list(_flat(environment)),
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    )
    return target


def _headline(metrics: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    tokens = metrics["tokens"]
    steps = f"{int(metrics['step'][-1]):,}"
    items = [("steps", steps), ("training tokens", short_count(tokens[-1]))]
    shares = {"of them selected": metrics["selected_share"]}
    for name in metrics:
        if name.startswith(records.OF_DOMAIN):
            shares[f"selected of {name.removeprefix(records.OF_DOMAIN)}"] = metrics[name]
    for words, share in shares.items():
        known = np.isfinite(share)
        if known.any():
            # A logged step stands for all steps since the one logged before it.
            spans = np.diff(tokens, prepend=0.0)[known]
            items.append((words, f"{np.average(share[known], weights=spans):.1%}"))
    if np.isfinite(metrics["seconds"]).any():
        items.append(("training time", duration(float(np.nanmax(metrics["seconds"])))))
    return items


def _result(evals: Mapping[str, Any]) -> str:
    """The held-out result in one sentence; numbers stand with the first comparison."""
    policy = losses(evals, "policy")
    names = {"initial": "the initial model's", "reference": "the reference's"}
    known = [model for model in names if losses(evals, model).keys() & policy.keys()]
    if not policy:
        return "Held-out losses were not measured."
    if not known:
        values = listed([f"{loss:.3f} on {domain}" for domain, loss in policy.items()])
        return f"The trained policy's held-out loss, in nats per token, is {values}."
    compared = [
        _compared(policy, losses(evals, model), names[model], numbers=model == known[0])
        for model in known
    ]
    return f"The trained policy's held-out loss, in nats per token, is {'; it is '.join(compared)}."


def _compared(
    ours: Mapping[str, float], theirs: Mapping[str, float], whose: str, *, numbers: bool
) -> str:
    """As in: lower than theirs on a, and higher on b. Equal is what three decimals cannot tell."""
    domains: dict[str, list[str]] = {"lower than": [], "equal to": [], "higher than": []}
    for domain in [d for d in ours if d in theirs]:
        a, b = f"{ours[domain]:.3f}", f"{theirs[domain]:.3f}"
        word = "equal to" if a == b else "lower than" if float(a) < float(b) else "higher than"
        domains[word].append(f"{domain} ({a} against {b})" if numbers else domain)
    parts: list[str] = []
    for word, where in domains.items():
        head = word.split()[0] if parts else f"{word} {whose}"
        parts += [f"{head} on {listed(where)}"] if where else []
    return ", and ".join(parts)


def _training(metrics: Mapping[str, np.ndarray]) -> Chart:
    some_left_out = np.isfinite(metrics["loss_unselected"]).any()
    subsets = list(SUBSETS) if some_left_out else ["all"]
    policy = {name: metrics[f"loss{SUBSETS[name]}"] for name in subsets}
    reference = {name: metrics[f"ref_loss{SUBSETS[name]}"] for name in subsets}
    if not np.isfinite(reference["all"]).any():
        reference = {}
    run = figures.points_per_mean(metrics["tokens"].size)
    caption = f"Each point is the mean of {run} logged steps. " if run > 1 else ""
    shaded = "The shaded gap between policy and reference is the mean excess loss."
    caption += shaded if reference else "The loss of a reference model was not recorded."
    return Chart(figures.losses_over_tokens(metrics["tokens"], policy, reference), caption)


def _heldout(
    heldout: Mapping[str, tuple[np.ndarray, np.ndarray]], evals: Mapping[str, Any]
) -> Chart | None:
    if not heldout:
        return None
    reference = losses(evals, "reference")
    dashed = " Dashed: the reference." if set(reference) & set(heldout) else ""
    chart = figures.heldout_over_tokens(heldout, reference)
    return Chart(chart, f"Loss on text held out from training, per domain.{dashed}")


def _task(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's results: (value, standard error) of each metric."""
    measured = {metric: v for metric, v in values.items() if isinstance(v, list)}
    return {"name": name, "n": values["n"], "metrics": measured}


def _scores(histogram: Mapping[str, Any], evals: Mapping[str, Any]) -> Chart:
    score = evals.get("selection", {}).get("score", "score")
    unitless = score in UNITLESS or ":" in score  # nothing is known of one from outside
    label = records.SCORES.get(score, score) + ("" if unitless else ", nats")
    values, useful = (histogram[key] for key in ("scores", "useful"))
    chart = figures.score_histogram(values, histogram["threshold"], useful, label=label)
    caption = (
        f"The score of {values.size:,} tokens; {np.mean(values >= histogram['threshold']):.0%} of "
        "them reach the threshold. The extremes, 1% of the tokens, lie outside the chart."
    )
    return Chart(chart, caption)


def _precision(evals: Mapping[str, Any]) -> Chart | None:
    precision, used = evals.get("precision"), evals.get("selection", {}).get("score")
    if not precision:
        return None
    values = {name: (v["precision"], v["useful_share"]) for name, v in precision.items()}
    own = " Blue: the score of this run." if used in values else ""
    caption = (
        "Of the tokens that each score selects, the percentage known to be useful. The line is "
        f"what a random choice would reach.{own}"
    )
    return Chart(figures.precision_bars(values, used=used), caption)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name} ")
        else:
            many = isinstance(item, list)
            yield f"{prefix}{name}", ", ".join(map(str, item)) if many else str(item)
