"""The config of an experiment: made of the schema, checked before anything else happens.

A file in configs/ starts from `default_config()` and sets what its experiment needs. The defaults
are the embedded experiment's; values from the paper are marked so where they are set.

`python -m rho1_jax.config > docs/config.md` writes the page of all keys (config_schema.py).
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rho1_jax import config_schema
from rho1_jax.config_schema import BY_KEY, DOMAINS, KEYS, RENAMED, STAGES
from rho1_jax.data.corpora import Source
from rho1_jax.errors import InputError, require_known
from rho1_jax.models.presets import PRESETS
from rho1_jax.slm import outside
from rho1_jax.slm.selection import Selection, mixture

_MOST_TOKENS = 2**31  # of a batch: they are counted in int32


def default_config() -> ConfigDict:
    """Every key of a config, unlocked."""
    c = ConfigDict()
    for key, entry in BY_KEY.items():
        *sections, name = key.split(".")
        if "*" in sections:
            continue
        place = c
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[name] = ConfigDict() if key in DOMAINS else entry.default
    return c


def source(
    spec: str, *, text: str = "text", split: str = "", weight: float = 1.0, prompt: str = ""
) -> ConfigDict:
    """One domain of a corpus; the fields are those of data/corpora.py's Source."""
    fields = {"spec": spec, "text": text, "split_field": split, "weight": weight, "prompt": prompt}
    return ConfigDict(fields)


def paper_batches(section: ConfigDict, *, tokens: int, seq_len: int, lr: float) -> None:
    """The paper's batches of 1M tokens at a peak learning rate, for `tokens` (0: by epochs)."""
    section.batch_size = 2**20 // seq_len
    section.steps = round(tokens / 2**20)
    section.lr = lr
    section.warmup_steps = 100


def sources(domains: ConfigDict) -> dict[str, Source]:
    """The domains of `data.corpus` or `data.clean` as data/corpora.py takes them."""
    return {
        name: Source(
            d.spec,
            text=d.text,
            split_field=d.split_field or None,
            weight=float(d.weight),
            prompt=d.prompt,
        )
        for name, d in domains.items()
    }


def later_weights(config: ConfigDict) -> list[tuple[float, dict[str, float]]]:
    """What data.weight_changes makes of the mixture: (share of training, weight by domain)."""
    of, found = {name: float(d.weight) for name, d in config.data.corpus.items()}, {}
    for share, domain, weight in sorted(config.data.weight_changes):
        of = of | {domain: float(weight)}
        found[float(share)] = of
    return list(found.items())


def selection(config: ConfigDict, n_shards: int, row_parts: int = 1) -> Selection:
    """The `select` section; InputError if it makes no sense. Weights of a repeated part add up."""
    s, parts = config.select, dict[str, float]()
    for name, weight in s.parts:
        parts[name] = parts.get(name, 0.0) + weight
    return Selection(
        s.score, float(s.ratio), s.scope, tuple(parts.items()), n_shards,
        float(s.unselected_weight), float(s.final_ratio) or None, s.schedule, row_parts=row_parts,
        domains=mixture(mean_shares(config), {k: float(v) for k, v in s.domain_ratios}),
        weight_range=float(s.weight_range), weight_slope=float(s.weight_slope),
        distill_weight=float(s.distill_weight), distill_top=s.distill_top,
        distill_all=s.distill_on == "all",
    )  # fmt: skip


def mean_shares(config: ConfigDict) -> dict[str, float]:
    """Of all rows that the policy reads, the share of each domain that it reads at some time."""
    first = {name: float(d.weight) for name, d in config.data.corpus.items()}
    weights = [(0.0, first), *later_weights(config)]
    ends = [start for start, _ in weights[1:]] + [1.0]
    means = dict.fromkeys(first, 0.0)
    for (start, of), end in zip(weights, ends, strict=True):
        for name, weight in of.items():
            means[name] += (end - start) * weight / (sum(of.values()) or 1.0)
    return {name: share for name, share in means.items() if share}


def needs_reference(config: ConfigDict) -> bool:
    """Whether there must be a reference before training."""
    s = selection(config, n_shards=1)
    if s.needs_utility and config.select.utility == "relevance":
        return True
    if config.score.source:
        return False
    if follows_policy(config) and config.select.ref_ema_init == "policy":
        return False
    return s.needs_reference


def follows_policy(config: ConfigDict) -> bool:
    """Whether the reference is a moving average of the policy; then no score can be cached."""
    return bool(config.select.ref_ema_decay < 1.0)


def flat(config: ConfigDict) -> dict[str, Any]:
    """Every value by its key, "a.b.c"."""
    return dict(_leaves(config))


def bound_part(config: ConfigDict, stage: str) -> dict[str, Any]:
    """What decides the output of a stage of STAGES, as plain JSON values by key "a.b.c"."""
    require_known("stage", stage, STAGES)
    values = {k: v for k, v in _leaves(config) if config_schema.entry_of(k).bound(config, stage)}
    named = (config.select.score, *(name for name, _ in config.select.parts))
    if "select.score" in values:
        values |= {f"source of {n}": outside.source_digest(n) for n in named if outside.named(n)}
    return json.loads(json.dumps(values))


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Where two bound parts differ first, as `key (there's value, here's value)`; None if
    nowhere. Keys of both come before those that only one has: another value bound them."""
    both = there.keys() & here.keys()
    for key in [*sorted(both), *sorted((there.keys() | here.keys()) - both)]:
        a, b = (part.get(key, "nothing") for part in (there, here))
        if a != b:
            return f"{key} ({a!r}, {b!r})"
    return None


def require_known_keys(config: ConfigDict, overrides: Sequence[str]) -> None:
    """InputError for an override `a.b=value` of no key: it names the nearest, or today's name."""
    known = flat(config)
    for override in overrides:
        key = override.split("=", 1)[0]
        if key in known:
            continue
        if key in RENAMED:
            raise InputError(f"--config.{key} is called --config.{RENAMED[key]} now.")
        within = next((k for k in known if k.startswith(key + ".")), None)
        if within:
            raise InputError(f"--config.{key} is a section: set a key of it, --config.{within}.")
        if key in DOMAINS:
            raise InputError(f"--config.{key} names no domain yet: add one in the config's file.")
        nearest = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.0)
        hint = f": did you mean --config.{nearest[0]}?" if nearest else "."
        raise InputError(f"--config.{key[:100]} is not a key of this config{hint}")


def require_values(config: ConfigDict) -> None:
    """InputError unless the config has every key and no other, each with a value it may have."""
    values = flat(config)
    for key in values:
        config_schema.entry_of(key)  # a misspelt or renamed one is missing under its name, too
    for key in KEYS:
        if key not in values:
            raise InputError(f"The config has no {key}: start from config.default_config().")
    for section in DOMAINS:
        domains = config.data.get(section.split(".")[1])
        BY_KEY[section].kind.require(section, domains, None)
        for name in domains:
            BY_KEY["name"].kind.require(f"The name of a domain of {section}", name, "web")
            if not {f"{section}.{name}.{field}" for field in source("")} <= values.keys():
                raise InputError(f"{section}.{name} is no source: write config.source('files:*').")
    for key, value in values.items():
        entry = config_schema.entry_of(key)
        entry.kind.require(key, value, entry.default)


def validate(config: ConfigDict) -> None:
    """InputError for values no stage could use; the data, files and devices are checked later."""
    require_values(config)
    for rule in (_sources_fit, _training_fits, _selection_fits, _reference_is_there):
        rule(config)
    if [size for _, size in config.mesh.items()].count(-1) > 1:
        raise InputError("More than one axis of mesh is -1: only one can take the devices left.")


def _sources_fit(c: ConfigDict) -> None:
    corpus, clean = sources(c.data.corpus), sources(c.data.clean)
    if not corpus:
        raise InputError("data.corpus names no source: add one, for instance files:*.jsonl.")
    if not any(s.weight for s in corpus.values()):
        raise InputError("data.corpus has no domain to train on: set a weight above 0.")
    for _, name, _ in c.data.weight_changes:
        require_known("data.weight_changes: domain", name, corpus)
    for share, of in later_weights(c):
        if not any(of.values()):
            raise InputError(
                f"data.weight_changes leaves no domain a weight above 0 from {share} on: set it."
            )
    for name in corpus.keys() & clean.keys():
        first, second = dict(c.data.corpus[name]), dict(c.data.clean[name])
        if first | {"weight": 0} != second | {"weight": 0}:
            raise InputError(
                f"data.corpus.{name} and data.clean.{name} name different sources: "
                "give one of them another name."
            )


def _training_fits(c: ConfigDict) -> None:
    for section in ("reference", "train"):
        t = c[section]
        if not t.steps and not t.epochs:
            raise InputError(
                f"{section}.steps is 0 and so is {section}.epochs: set one of them above 0."
            )
        _schedule_fits(section, t)
        if t.batch_size % t.accumulation:
            raise InputError(
                f"{section}.batch_size={t.batch_size} rows do not divide over {section}."
                f"accumulation={t.accumulation} microbatches: make it a multiple of them."
            )
    for section in ("reference", "train", "score"):
        if c[section].batch_size * c.data.seq_len >= _MOST_TOKENS:
            raise InputError(
                f"{section}.batch_size={c[section].batch_size} times data.seq_len={c.data.seq_len} "
                f"is {_MOST_TOKENS} tokens or more: make one of them smaller."
            )


def _schedule_fits(section: str, t: ConfigDict) -> None:
    left = t.steps - t.warmup_steps if t.steps else t.decay_steps
    if not (0 < t.decay_steps <= left if t.schedule == "wsd" else t.decay_steps == 0):
        raise InputError(
            f"{section}.decay_steps is {t.decay_steps}, with {section}.schedule={t.schedule}, "
            f"{t.steps} steps and {t.warmup_steps} of warmup: wsd needs some, at most as many as "
            "are left after the warmup, and other schedules have none."
        )


def _selection_fits(c: ConfigDict) -> None:
    s, top = selection(c, n_shards=1), c.train.backward_rows_top
    if s.score == "combined" and not any(weight for _, weight in s.parts):
        raise InputError("select.parts has weights that add up to 0: give one score another.")
    if s.score == "all" and s.own_ratios:
        raise InputError(
            "select.domain_ratios gives domains ratios of their own, but select.score=all selects "
            "none: set another score, or leave the ratios out."
        )
    if s.score != "all" and not c.select.unselected_weight:
        _require_some_kept(c, s)
    if top and s.trains_all:
        raise InputError(
            "train.backward_rows_top goes back through selected tokens only, but every token "
            "weighs something: set it to 0, or select.ratio below 1 and "
            "select.unselected_weight to 0."
        )
    if top and not c.model.init and top > PRESETS[c.model.preset].n_layers:
        raise InputError(
            f"train.backward_rows_top is {top}, but model.preset={c.model.preset} has "
            f"{PRESETS[c.model.preset].n_layers} blocks: set it to that at most."
        )
    if s.needs_utility and not c.select.utility:
        raise InputError(
            f"select.score={s.score} reads a utility: set select.utility to the one "
            "that the score stage shall compute, relevance or tags:number,latex."
        )
    if follows_policy(c) and not s.needs_reference:
        raise InputError(
            f"select.ref_ema_decay is {c.select.ref_ema_decay}, but select.score={s.score} reads "
            "no reference that could follow the policy: set it to 1, or a score such as excess."
        )


def _require_some_kept(c: ConfigDict, s: Selection) -> None:
    """Of shards it is not known how large they are; no larger than a microbatch."""
    rows = {"sequence": 1, "batch": c.train.batch_size}
    n = rows.get(s.scope, c.train.batch_size // c.train.accumulation) * c.data.seq_len
    ratio = max(s.ratio, s.last_ratio, *s.own_ratios.values())
    if round(np.float32(ratio) * np.float32(n)) < 1:
        raise InputError(
            f"select.ratio is {s.ratio}: of the {n} tokens that compete (select.scope={s.scope}) "
            f"it keeps none; set it to {min(1.0, 1 / n):.2g} at least."
        )


def _given_scores_suffice(c: ConfigDict) -> None:
    asks = {
        "score.cached=False": not c.score.cached,
        f"select.ref_ema_decay={c.select.ref_ema_decay}": follows_policy(c),
        f"select.distill_weight={c.select.distill_weight}": c.select.distill_weight > 0,
        "select.utility=relevance": c.select.utility == "relevance",
    }
    for key in (key for key, asked in asks.items() if asked and c.score.source):
        raise InputError(
            f"score.source gives scores, but {key} asks a model: leave one of them at its default."
        )


def _reference_is_there(c: ConfigDict) -> None:
    _given_scores_suffice(c)
    clean = any(weight > 0 for weight in (d.weight for d in c.data.clean.values()))
    if c.select.utility == "relevance" and not clean:
        raise InputError(
            "select.utility=relevance is likeness to the clean text, but data.clean names none "
            "of a weight above 0: add a source."
        )
    if needs_reference(c) and not c.reference.init and not clean:
        extras = [k for k in ("weight_range", "distill_weight") if c.select[k]]
        reads = extras[0] if c.select.score == "all" and extras else "score"
        raise InputError(
            f"select.{reads}={c.select[reads]} needs a reference, but data.clean names no corpus "
            "of a weight above 0 to train one on: add a source, or set reference.init to a model."
        )


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    print(config_schema.page(), end="")
