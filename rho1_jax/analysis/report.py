"""report.html of a run: what was run, what it measured, and what it selected, on one page.

What the run's folder lacks is left out with a sentence; what is broken is an InputError. Every
sentence of the page is made from the folder's numbers and claims no more than they say.
"""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax.analysis import figures, records
from rho1_jax.analysis.figures import short_count
from rho1_jax.analysis.records import MODELS, SUBSETS
from rho1_jax.analysis.token_view import facts, passage_html, write_page
from rho1_jax.training.metrics import duration

SCORES = {
    "excess": "excess loss",
    "loss": "loss",
    "reference": "confidence of the reference",
    "entropy": "certainty of the reference",
    "inverse": "negated excess loss (a control)",
    "random": "random score (a control)",
    "middle": "closeness to the median loss",
    "combined": "combined score",
}
UNITLESS = ("random", "combined", "score", "diversity", "utility")
SCOPES = {
    "batch": "each global batch",
    "microbatch": "each accumulation step",
    "shard": "each device's part of the batch",
    "sequence": "each sequence",
}


def write(
    workdir: str | Path,
    *,
    passages: Sequence[Mapping[str, Any]],
    histogram: Mapping[str, Any] | None,
    out: str | Path | None = None,
) -> Path:
    """Writes the run's report to `out` (by default workdir/report.html) and returns its path.

    Args: passages with the keys pieces, loss, ref_loss, score, selected (see
    `token_view.passage_html`) and title; histogram with scores [n], threshold, and useful [n] or
    None; without it, that section is left out.
    Raises: InputError naming the file (and line) if metrics.csv is missing, or any file is broken.
    """
    folder = Path(workdir)
    metrics = records.read_metrics(folder / "metrics.csv")
    heldout = records.read_heldout(folder / "heldout.csv")
    evals = records.read_eval(folder / "eval.json")
    config = records.read_json(folder / "config.json")
    environment = records.read_json(folder / "environment.json")
    sections = [
        ("", _headline(metrics, evals)),
        ("Training", _training(metrics)),
        ("Held-out loss", _heldout(heldout, evals)),
        *([("Benchmarks", _benchmarks(evals["tasks"]))] if evals.get("tasks") else []),
        ("What is selected", _scores(histogram, evals) + _precision(evals)),
        ("Marked passages", _passages(passages)),
        ("Configuration and environment", _settings(config, environment)),
    ]
    target = Path(out) if out else folder / "report.html"
    write_page(target, f"Run {folder.resolve().name}", sections)
    return target


def _headline(metrics: Mapping[str, np.ndarray], evals: Mapping[str, Any]) -> str:
    tokens, share = metrics["tokens"], metrics["selected_share"]
    steps = f"{int(metrics['step'][-1]):,}"
    items = [("steps", steps), ("training tokens", short_count(tokens[-1]))]
    known = np.isfinite(share)
    if known.any():
        # A logged step stands for all steps since the one logged before it.
        spans = np.diff(tokens, prepend=0.0)[known]
        items.append(("of them selected", f"{np.average(share[known], weights=spans):.1%}"))
    if np.isfinite(metrics["seconds"]).any():
        items.append(("training time", duration(float(np.nanmax(metrics["seconds"])))))
    method = html.escape(_method(evals.get("selection", {})))
    return f'<p class="lede">{method} {html.escape(_result(evals))}</p>{facts(items)}'


def _method(selection: Mapping[str, Any]) -> str:
    score, ratio, scope = (selection.get(key) for key in ("score", "ratio", "scope"))
    if score == "all" or ratio == 1.0:
        return "Causal language modeling: every token entered the loss."
    if score is None or ratio is None:
        return "How tokens were selected is not recorded in the run's folder."
    where = SCOPES.get(str(scope), f"each {scope}")
    if score in ("intersection", "union"):
        return (
            f"Selective language modeling: of {where}, the {score} of several scores' selections, "
            f"{ratio:.0%} of the tokens each, entered the loss."
        )
    return (
        f"Selective language modeling: of {where}, the {ratio:.0%} of tokens with the highest "
        f"{SCORES.get(score, score)} entered the loss."
    )


def _result(evals: Mapping[str, Any]) -> str:
    """The held-out result in one sentence; numbers stand with the first comparison."""
    policy = _losses(evals, "policy")
    names = {"initial": "the initial model's", "reference": "the reference's"}
    known = [model for model in names if _losses(evals, model).keys() & policy.keys()]
    if not policy:
        return "Held-out losses were not measured."
    if not known:
        values = _and([f"{loss:.3f} on {domain}" for domain, loss in policy.items()])
        return f"The trained policy's held-out loss, in nats per token, is {values}."
    compared = [
        _compared(policy, _losses(evals, model), names[model], numbers=model == known[0])
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
        parts += [f"{head} on {_and(where)}"] if where else []
    return ", and ".join(parts)


def _training(metrics: Mapping[str, np.ndarray]) -> str:
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
    return _figure(figures.losses_over_tokens(metrics["tokens"], policy, reference), caption)


def _heldout(heldout: Mapping[str, tuple[np.ndarray, np.ndarray]], evals: Mapping[str, Any]) -> str:
    parts = []
    if heldout:
        reference = _losses(evals, "reference")
        dashed = " Dashed: the reference." if set(reference) & set(heldout) else ""
        chart = figures.heldout_over_tokens(heldout, reference)
        parts.append(_figure(chart, f"Loss on text held out from training, per domain.{dashed}"))
    models = [name for name in MODELS if evals.get(name)]
    if models:
        parts.append(_table(evals, models))
    return "".join(parts) or _absent("Held-out losses were not measured in this run.")


def _table(evals: Mapping[str, Any], models: Sequence[str]) -> str:
    domains = list(dict.fromkeys(domain for model in models for domain in evals[model]))
    metrics = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
    groups = "".join(f'<th colspan="{len(models)}">{unit}</th>' for unit in metrics.values())
    names = "".join(f"<th>{model}</th>" for _ in metrics for model in models)
    rows = []
    for domain in domains:
        cells = "".join(
            f"<td{' class=own' if model == 'policy' else ''}>"
            f"{_cell(evals[model].get(domain, {}).get(metric))}</td>"
            for metric in metrics
            for model in models
        )
        rows.append(f"<tr><th>{html.escape(domain)}</th>{cells}</tr>")
    return (
        '<div class="wide"><table><caption>Each value comes from one run on one held-out set; '
        "how it varies with the seed is not measured here.</caption>"
        f"<thead><tr><th></th>{groups}</tr><tr><th></th>{names}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _benchmarks(tasks: Mapping[str, Any]) -> str:
    """The harness's results, a row for each task and metric."""
    rows = []
    for task, values in tasks.items():
        measured = {name: v for name, v in values.items() if isinstance(v, list)}
        for i, (metric, (value, error)) in enumerate(measured.items()):
            head = f'<th rowspan="{len(measured)}">{html.escape(task)} ({values["n"]:,})</th>'
            cells = "".join(f"<td>{_cell(x)}</td>" for x in (value, error))
            rows.append(f"<tr>{head if i == 0 else ''}<th>{html.escape(metric)}</th>{cells}</tr>")
    return (
        '<div class="wide"><table><caption>The trained policy on each task (number of items), one '
        "run; the standard error is over items.</caption><thead><tr><th>task</th><th>metric</th>"
        f"<th>value</th><th>standard error</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div>"
    )


def _scores(histogram: Mapping[str, Any] | None, evals: Mapping[str, Any]) -> str:
    if histogram is None:
        return _absent("The scores of single tokens were not recorded in this run.")
    score = evals.get("selection", {}).get("score", "score")
    label = SCORES.get(score, score) + ("" if score in UNITLESS else ", nats")
    values, useful = (histogram[key] for key in ("scores", "useful"))
    chart = figures.score_histogram(values, histogram["threshold"], useful, label=label)
    caption = (
        f"The score of {values.size:,} tokens; {np.mean(values >= histogram['threshold']):.0%} of "
        "them reach the threshold. The extremes, 1% of the tokens, lie outside the chart."
    )
    return _figure(chart, caption)


def _precision(evals: Mapping[str, Any]) -> str:
    precision, used = evals.get("precision"), evals.get("selection", {}).get("score")
    if not precision:
        return _absent("Which tokens are worth learning is not known for this corpus.")
    values = {name: (v["precision"], v["useful_share"]) for name, v in precision.items()}
    own = " Blue: the score of this run." if used in values else ""
    caption = (
        "Of the tokens that each score selects, the percentage known to be useful. The line is "
        f"what a random choice would reach.{own}"
    )
    return _figure(figures.precision_bars(values, used=used), caption)


def _passages(passages: Sequence[Mapping[str, Any]]) -> str:
    if not passages:
        return _absent("No passages were given.")
    keys = ("pieces", "loss", "ref_loss", "score", "selected")
    marked = (passage_html(*(p[key] for key in keys), title=p["title"]) for p in passages)
    intro = "Selected tokens are blue. Point at a token for its losses (nats), score and rank."
    return f'<p class="note">{intro}</p>{"".join(marked)}'


def _settings(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    row = "<tr><th>{}</th><td>{}</td></tr>".format
    rows = "".join(row(html.escape(k), html.escape(v)) for k, v in _flat(environment))
    table = f'<div class="wide"><table class="plain"><tbody>{rows}</tbody></table></div>'
    dump = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return (table if rows else _absent("The environment was not recorded.")) + (
        f"<details><summary>The whole configuration</summary><pre>{dump}</pre></details>"
        if config
        else _absent("The configuration was not recorded.")
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name} ")
        else:
            many = isinstance(item, list)
            yield f"{prefix}{name}", ", ".join(map(str, item)) if many else str(item)


def _losses(evals: Mapping[str, Any], model: str) -> dict[str, float]:
    """Held-out loss per domain, where it is finite."""
    found = {domain: values["loss"] for domain, values in evals.get(model, {}).items()}
    return {domain: loss for domain, loss in found.items() if math.isfinite(loss)}


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _absent(sentence: str) -> str:
    return f'<p class="note">{html.escape(sentence)}</p>'


def _and(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))
