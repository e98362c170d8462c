"""report.html of a run: what was run, what it measured, and what it selected, on one page.

Reads the run's folder: metrics.csv (required), heldout.csv, eval.json, config.json,
environment.json. What is absent is left out with a sentence; what is broken is an InputError.
Every sentence of the page is made from these numbers and claims no more than they say.
"""

import csv
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax.analysis import figures
from rho1_jax.analysis.figures import short_count
from rho1_jax.analysis.token_view import facts, passage_html, write_page
from rho1_jax.errors import InputError
from rho1_jax.training.metrics import duration

SUBSETS = {"all": "", "selected": "_selected", "unselected": "_unselected"}
METRICS = ("step", "tokens", "seconds", "selected_share") + tuple(
    f"{model}loss{suffix}" for model in ("", "ref_") for suffix in SUBSETS.values()
)
MODELS = ("initial", "reference", "policy")
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
    metrics = read_metrics(folder / "metrics.csv")
    heldout = read_heldout(folder / "heldout.csv")
    evals = read_eval(folder / "eval.json")
    config = _read_json(folder / "config.json")
    environment = _read_json(folder / "environment.json")
    sections = [
        ("", _headline(metrics, evals)),
        ("Training", _training(metrics)),
        ("Held-out loss", _heldout(heldout, evals)),
        ("What is selected", _scores(histogram, evals) + _precision(evals)),
        ("Marked passages", _passages(passages)),
        ("Configuration and environment", _settings(config, environment)),
    ]
    target = Path(out) if out else folder / "report.html"
    write_page(target, f"Run {folder.resolve().name}", sections)
    return target


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as float64 [steps], NaN where a cell is empty."""
    if not path.exists():
        raise InputError(f"{path} does not exist: run the train stage, then the report.")
    rows = _read_csv(path, ("step", "tokens", "loss"))
    columns = {name: np.array([_number(path, row, name) for row in rows]) for name in METRICS}
    for name in ("step", "tokens"):
        missing = np.flatnonzero(~np.isfinite(columns[name]))
        if missing.size:
            raise InputError(_broken(path, rows[missing[0]], f"{name} is not a number"))
    return columns


def read_heldout(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per domain (tokens seen, loss in nats per token) of heldout.csv; {} if it is absent."""
    if not path.exists():
        return {}
    rows = _read_csv(path, ("tokens", "domain", "loss"))
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = _number(path, row, "tokens"), _number(path, row, "loss")
        points.setdefault(row["domain"], []).append(point)
    return {domain: (np.array(p)[:, 0], np.array(p)[:, 1]) for domain, p in points.items()}


def read_eval(path: Path) -> dict[str, Any]:
    """eval.json, {} if it is absent; InputError if a number that the report shows is missing."""
    evals = _read_json(path)
    needed = dict.fromkeys(MODELS, ("loss", "bits_per_byte"))
    for section, keys in (needed | {"precision": ("precision", "useful_share")}).items():
        for name, values in evals.get(section, {}).items():
            for key in keys:
                if not isinstance(values.get(key), int | float):
                    where = f"{section}.{name}.{key}"
                    raise InputError(f"{path} has no number {where}: evaluate the run again.")
    return evals


def _read_csv(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [row | {"": str(reader.line_num)} for row in reader]  # "": for messages
            header = reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file ({error}): run its stage again.") from None
    lacking = [name for name in required if name not in header]
    if lacking:
        raise InputError(f"{path} has no column {', '.join(lacking)}: run its stage again.")
    if not rows:
        raise InputError(f"{path} holds no rows: run its stage again.")
    for row in rows:
        if None in row or None in row.values():
            raise InputError(_broken(path, row, "the number of cells is not that of the header"))
    return rows


def _number(path: Path, row: Mapping[str, str], name: str) -> float:
    cell = row.get(name, "").strip()
    try:
        return float(cell) if cell else float("nan")
    except ValueError:
        raise InputError(_broken(path, row, f"{name} is {cell!r}, not a number")) from None


def _broken(path: Path, row: Mapping[str, str], what: str) -> str:
    return f"{path}, line {row['']}: {what}; remove the line or run its stage again."


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a JSON object ({error}): run its stage again.") from None


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
