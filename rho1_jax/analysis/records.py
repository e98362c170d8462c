"""What a run's folder says of it: metrics.csv, heldout.csv and JSON files, read and checked."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rho1_jax import files, jsonfile
from rho1_jax.errors import InputError

SUBSETS = {"all": "", "selected": "_selected", "unselected": "_unselected"}
METRICS = ("step", "tokens", "seconds", "selected_share", "precision", "useful_share") + tuple(
    f"{model}loss{suffix}" for model in ("", "ref_") for suffix in SUBSETS.values()
)
OF_DOMAIN = "selected_share/"
MODELS = ("initial", "reference", "policy")

_AS_IT_IS = "put back a copy of it, or delete the checksum to go on with what is there"

EVERY_TOKEN = "every token entered the loss"
# What each score measures: the tokens with the highest value are selected.
SCORES = {
    "excess": "excess loss",
    "loss": "loss",
    "reference": "negative reference loss",
    "entropy": "negative reference entropy",
    "middle": "negative distance to the median loss",
    "diversity": "negative count of earlier repeats",
    "inverse": "negative excess loss",
}
COMPOSITE = ("combined", "intersection", "union")
READ_A_REFERENCE = {"excess", "reference", "entropy", "inverse"}
SCOPES = {
    "batch": "each global batch",
    "microbatch": "each accumulation step",
    "shard": "each device's part of the batch",
    "sequence": "each sequence",
}


def entered_the_loss(select: Mapping[str, Any]) -> str:
    """Which tokens a run trained on, as a clause without a full stop.

    select: plain values as in config.json's `select`, of which score, ratio and scope must be
    there: score, ratio, final_ratio (0 or None: the ratio stays), schedule, scope, parts,
    unselected_weight, ref_ema_decay, ref_ema_init, utility, domain_ratios,
    weight_range, weight_slope, distill_weight, distill_on.
    """
    first = select["ratio"]
    last = select.get("final_ratio") or first
    own = select.get("domain_ratios") or ()
    weighed = _weighed(select)
    if select["score"] == "all" or first == last == min([1.0, *(ratio for _, ratio in own)]) == 1.0:
        return EVERY_TOKEN + weighed
    where = SCOPES.get(select["scope"], f"each {select['scope']}")
    chosen = f"of {where}, {_chosen(select, f'{_percent(first)} of ' if first == last else '')}"
    said = f"{chosen} entered the loss"
    if weight := select.get("unselected_weight", 0.0):
        said = f"all tokens entered the loss, the unselected with weight {weight:g}; "
        said += f"selected were, {chosen}"
    if first != last:
        said += f", from {_percent(first)} at the start to {_percent(last)} at the end"
        said += f" ({select.get('schedule', 'linear')} schedule)"
    decay = select.get("ref_ema_decay", 1.0)
    composite = select["score"] in COMPOSITE
    names = [name for name, _ in select["parts"]] if composite else [select["score"]]
    # Of a score from outside it is not known here; a run with such a decay has one that reads it.
    if decay < 1.0 and any(name in READ_A_REFERENCE or ":" in name for name in names):
        said += f", scored against a moving average of the policy (decay {decay:g}, "
        said += f"initialised from the {select.get('ref_ema_init', 'policy')})"
    for domain, ratio in own:
        of = "every token" if ratio == 1.0 else f"{_percent(ratio)}, competing for itself"
        said += f"; of {domain} {of}"
    return said + weighed


def _weighed(select: Mapping[str, Any]) -> str:
    reach, slope = select.get("weight_range", 0.0), select.get("weight_slope", 1.0)
    taught, said = select.get("distill_weight", 0.0), ""
    if reach:
        said = f", weighing {1 - reach:g} to {1 + reach:g} by the excess loss over the mean of its "
        said += f"row (slope {slope:g})"
    if taught:
        tokens = "all tokens" if select.get("distill_on") == "all" else "these"
        said += (
            f"; beside it, with weight {taught:g}, the divergence from the reference on {tokens}"
        )
    return said


def _chosen(select: Mapping[str, Any], share: str) -> str:
    """As in: the 60% of tokens with the highest excess loss."""
    score, parts = select["score"], select.get("parts", ())
    if score == "random":
        return f"a random {share}the tokens" if share else "random tokens"
    if score in COMPOSITE[1:]:
        sets = [_chosen({**select, "score": name}, share) for name, _ in parts]
        return f"the {score} of {listed(sets)}"
    if score == "combined":
        terms = [f"{_label(select, name)} ({weight:g})" for name, weight in parts]
        return f"the {share}tokens with the highest weighted sum of {listed(terms)}, standardised,"
    label = _label(select, score)
    if label.startswith("negative "):
        return f"the {share}tokens with the lowest {label.removeprefix('negative ')}"
    return f"the {share}tokens with the highest {label}"


def _label(select: Mapping[str, Any], score: str) -> str:
    return f"utility ({select.get('utility')})" if score == "utility" else SCORES.get(score, score)


def _percent(share: float) -> str:
    return f"{100.0 * share:.4g}%"


def listed(items: Sequence[str]) -> str:
    """As in: a, b and c."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as float64 [steps], NaN where a cell is empty; beside METRICS those
    of the shares by domain, OF_DOMAIN + its name."""
    files.require_sealed(path, _AS_IT_IS)
    if not path.exists():
        raise InputError(
            f"{path} does not exist: run the train stage (if its checkpoints are finished, delete "
            "them first), then the report."
        )
    rows = _read_csv(path, ("step", "tokens", "loss"))
    names = METRICS + tuple(name for name in rows[0] if name.startswith(OF_DOMAIN))
    columns = {name: np.array([_number(path, row, name) for row in rows]) for name in names}
    for name in ("step", "tokens"):
        missing = np.flatnonzero(~np.isfinite(columns[name]))
        if missing.size:
            raise InputError(_broken(path, rows[missing[0]], f"{name} is not a number"))
    return columns


def read_heldout(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per domain (tokens seen, loss in nats per token) of heldout.csv; {} if it is absent."""
    files.require_sealed(path, _AS_IT_IS)
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
    evals = read_json(path)
    needed = dict.fromkeys(MODELS, ("loss", "bits_per_byte"))
    for section, keys in (needed | {"precision": ("precision", "useful_share")}).items():
        for name, values in evals.get(section, {}).items():
            for key in keys:
                if not isinstance(values.get(key), int | float):
                    where = f"{section}.{name}.{key}"
                    raise InputError(f"{path} has no number {where}: evaluate the run again.")
    return evals


def losses(evals: Mapping[str, Any], model: str) -> dict[str, float]:
    """A model's held-out loss per domain, in nats per token, where it is finite."""
    found = {domain: values["loss"] for domain, values in evals.get(model, {}).items()}
    return {domain: loss for domain, loss in found.items() if math.isfinite(loss)}


def method(evals: Mapping[str, Any]) -> str:
    """What a run did, in one sentence; EVERY_TOKEN's is causal language modeling."""
    said = evals.get("selection", {}).get("said")
    if said is None:
        return "How tokens were selected is not recorded in the run's folder."
    kind = "Causal" if said == EVERY_TOKEN else "Selective"
    return f"{kind} language modeling: {said}."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if it is absent; InputError if it holds none."""
    if not path.exists():
        return {}
    return jsonfile.read(path)


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
