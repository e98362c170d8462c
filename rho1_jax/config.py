"""The schema of an experiment: every key, its meaning, and the checks that need no data.

A file in configs/ starts from `default_config()` and sets what its experiment needs. The defaults
are the embedded experiment's; values from the paper are marked so where they are set.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from rho1_jax.data import taggers
from rho1_jax.data.corpora import Source
from rho1_jax.errors import InputError, require_known
from rho1_jax.slm.selection import Selection

# Keys that may change between two runs in one folder: they do not change what is computed.
FREE_KEYS = ("mesh", "checkpoint", "log_every")


def default_config() -> ConfigDict:
    """Every key of a config, unlocked."""
    c = ConfigDict()
    c.name = ""
    c.seed = 0

    c.model = ConfigDict()
    c.model.preset = "tiny"  # a name in models/presets.py; ignored where init gives the shape
    c.model.init = ""  # what to start from (models/load.py says what it may be); "" is from scratch
    c.model.dtype = "float32"  # of the computation; master weights are float32
    c.model.ref_dtype = "float32"  # of the reference's parameters and computation
    c.model.remat = "none"  # none | dots | full

    c.tokenizer = ConfigDict()
    c.tokenizer.source = "train"  # "train", "init" (of model.init), or a file or folder
    c.tokenizer.vocab_size = 2048  # of a tokenizer trained here

    c.data = ConfigDict()
    c.data.root = "."  # relative file sources start here
    c.data.seq_len = 256  # targets in a row
    c.data.corpus = ConfigDict()  # domain -> source: what the policy is trained on
    c.data.clean = ConfigDict()  # domain -> source: what the reference is trained on

    c.reference = _training(lr=3e-3, steps=200)
    c.reference.init = ""  # load this model instead of training one; "" trains
    c.reference.epochs = 3.0  # times the clean rows, where steps is 0 (the paper's 3)

    c.score = ConfigDict()
    c.score.cached = True  # False: the reference runs live in every step
    c.score.entropy = False  # also store the reference's predictive entropy
    c.score.batch_size = 32  # rows

    c.select = ConfigDict()
    c.select.score = "excess"
    c.select.ratio = 0.6
    c.select.scope = "batch"
    c.select.parts = ()  # ((score, weight), ...) for combined, intersection and union
    c.select.final_ratio = 0.0  # of the last step; 0: ratio stays
    c.select.schedule = "linear"  # linear | cosine: how ratio becomes final_ratio
    c.select.floor = 0.0  # weight of the tokens that are not selected; above 0 none is dropped
    c.select.decay = 1.0  # below 1 the reference is a moving average of the policy, with this decay
    c.select.average_of = "policy"  # where it starts: policy | reference
    c.select.utility = ""  # the score "utility": relevance | tags:... (training/utility.py)

    c.train = _training(lr=3e-3, steps=300)
    c.train.epochs = 0.0  # times the corpus's rows, where steps is 0
    # Approximate: this many upper blocks go back through selected tokens only (slm/backward.py).
    c.train.backward_rows_top = 0  # 0: the exact gradient

    c.loss_chunk_tokens = 4096  # most tokens whose logits exist at once
    c.eval = ConfigDict()
    c.eval.every = 50  # steps
    c.eval.rows = 64  # of each held-out domain, at most
    c.eval.tasks = ()  # benchmarks (evaluation/harness.py) of the finished policy
    c.eval.data_dir = ""  # of their files
    c.eval.limit = 0  # items of each; 0 is all
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps
    c.checkpoint.keep = 2
    c.log_every = 1
    # Devices over which rows (data, fsdp), parameters (fsdp, sequence), each row along its length
    # (sequence) and each layer (tensor) are split; one may be -1 and takes the rest.
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1})
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
            weight=d.weight,
            prompt=d.prompt,
        )
        for name, d in domains.items()
    }


def selection(config: ConfigDict, n_shards: int, row_parts: int = 1) -> Selection:
    """The `select` section; InputError if it makes no sense."""
    s = config.select
    try:
        parts = tuple((str(name), float(weight)) for name, weight in s.parts)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"select.parts is {s.parts!r}: write pairs of score and weight, "
            "(('reference', 1.0), ('entropy', 1.0))."
        ) from error
    final_ratio = s.final_ratio or None
    return Selection(
        s.score, s.ratio, s.scope, parts, n_shards, s.floor, final_ratio, s.schedule,
        row_parts=row_parts,
    )  # fmt: skip


def validate(config: ConfigDict) -> None:
    """InputError for values no stage could use; the data, files and devices are checked later."""
    selection(config, n_shards=1)
    if not config.data.corpus:
        raise InputError("data.corpus names no source: add one, for instance files:*.jsonl.")
    for section in ("reference", "train"):
        _require_positive(config, section, ("batch_size", "accumulation", "lr", "clip"))
        if config[section].steps < 0 or config[section].warmup_steps < 0:
            raise InputError(f"{section}.steps and {section}.warmup_steps cannot be negative.")
    if not config.reference.steps and config.reference.epochs <= 0:
        raise InputError("reference.steps and reference.epochs are both 0: set one of them.")
    for key in ("dtype", "ref_dtype"):
        require_known(f"model.{key}", config.model[key], ("float32", "bfloat16"))
    if config.log_every < 1 or config.loss_chunk_tokens < 1:
        raise InputError("log_every and loss_chunk_tokens must be at least 1.")
    if config.train.steps < 1 and config.train.epochs <= 0:
        raise InputError(f"train.steps is {config.train.steps}: set it to at least 1.")
    if config.train.backward_rows_top < 0:
        raise InputError("train.backward_rows_top counts blocks: 0 is exact, no less.")
    if config.train.backward_rows_top and selection(config, n_shards=1).trains_all:
        raise InputError(
            "train.backward_rows_top goes back through selected tokens only, but every token is "
            "selected or has a floor: set it to 0, or select.ratio below 1 and select.floor to 0."
        )
    if not 0.0 < config.select.decay <= 1.0:
        raise InputError(
            f"select.decay is {config.select.decay}: set it above 0 and below 1 for a reference "
            "that follows the policy, or to 1 for one that stays."
        )
    if selection(config, n_shards=1).needs_utility and not config.select.utility:
        raise InputError(
            f"select.score={config.select.score} reads a utility: set select.utility to the one "
            "that the score stage shall compute, relevance or tags:number,latex."
        )
    if config.select.utility:
        taggers.parse_utility(config.select.utility)
    if config.select.utility == "relevance" and not config.data.clean:
        raise InputError(
            "select.utility=relevance is likeness to the clean text, but data.clean names none: "
            "add a source."
        )
    require_known("select.average_of", config.select.average_of, ("policy", "reference"))
    if needs_reference(config) and not config.reference.init and not config.data.clean:
        raise InputError(
            f"select.score={config.select.score} needs a reference, but data.clean names no corpus "
            "to train one on: add a source, or set reference.init to a model."
        )
    _require_positive(config, "data", ("seq_len",))
    _require_positive(config, "score", ("batch_size",))
    _require_positive(config, "eval", ("every", "rows"))
    _require_positive(config, "checkpoint", ("every", "keep"))


def needs_reference(config: ConfigDict) -> bool:
    """Whether there must be a reference before training."""
    s = selection(config, n_shards=1)
    if s.needs_utility and config.select.utility == "relevance":
        return True
    if follows_policy(config) and config.select.average_of == "policy":
        return False
    return s.needs_reference


def follows_policy(config: ConfigDict) -> bool:
    """Whether the reference is a moving average of the policy; then no score can be cached."""
    return bool(config.select.decay < 1.0)


def bound_part(config: ConfigDict) -> dict[str, Any]:
    """What decides the numbers of a run, as plain JSON values."""
    plain = json.loads(config.to_json_best_effort())
    free = set(FREE_KEYS)
    if config.select.scope == "shard":  # then the mesh says which tokens compete
        free.remove("mesh")
    return {k: v for k, v in plain.items() if k not in free}


def first_difference(a: Any, b: Any, path: str = "config") -> str | None:
    """Where two plain configs differ first, as `key (a's value, b's value)`; None if nowhere."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return None if a == b else f"{path} ({a!r}, {b!r})"
    for key in sorted(a.keys() | b.keys()):
        found = first_difference(a.get(key), b.get(key), f"{path}.{key}")
        if found:
            return found
    return None


def digest(value: Any) -> str:
    """Hex sha256 of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require_known_keys(config: ConfigDict, overrides: Sequence[str]) -> None:
    """InputError naming the nearest key for an override `a.b=value` the config does not have."""
    known = list(_flat_keys(config))
    for override in overrides:
        key = override.split("=", 1)[0]
        if key in known or any(k.startswith(key + ".") for k in known):
            continue
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        hint = f": did you mean --config.{nearest[0]}?" if nearest else "."
        raise InputError(f"--config.{key} is not a key of this config{hint}")


def _flat_keys(config: ConfigDict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat_keys(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def _training(lr: float, steps: int) -> ConfigDict:
    """What the reference and the policy share: AdamW with warmup and cosine decay."""
    return ConfigDict(
        {
            "steps": steps,
            "batch_size": 8,  # rows, over all devices
            "accumulation": 1,  # microbatches a step
            "lr": lr,
            "warmup_steps": 20,
            "final_lr_share": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.1,
            "clip": 1.0,
        }
    )


def _require_positive(config: ConfigDict, section: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        if config[section][key] <= 0:
            raise InputError(f"{section}.{key} is {config[section][key]}: set it above 0.")
