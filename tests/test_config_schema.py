"""The schema: the page it makes, what each key decides, and thousands of values and command lines.

Each of those is accepted only if it makes sense by the rules written down here, apart from the
schema; else it is one sentence.
"""

import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import math as math_config
from rho1_jax import config as config_lib
from rho1_jax import config_file, config_schema
from rho1_jax.config_schema import ENTRIES, FREE, STAGES
from rho1_jax.errors import InputError
from tests import tiny_config

ROOT = Path(__file__).parent.parent
KEYS = tuple(config_lib.flat(math_config.get_config()))
SHARES = {
    "ratio", "final_ratio", "unselected_weight", "ref_ema_decay", "final_lr_share", "b1", "b2"
}  # fmt: skip
BELOW_ONE = {"unselected_weight", "b1", "b2"}
POSITIVE = {"lr", "clip", "ratio", "ref_ema_decay"}
MAY_BE_ZERO = {"seed", "steps", "warmup_steps", "decay_steps", "backward_rows_top", "limit"}
CHOICES = {
    "model.dtype": {"float32", "bfloat16"}, "model.ref_dtype": {"float32", "bfloat16"},
    "model.remat": {"none", "dots", "full"}, "select.schedule": {"linear", "cosine"},
    "select.scope": {"batch", "microbatch", "shard", "sequence"},
    "select.ref_ema_init": {"policy", "reference"}, "model.preset": {"tiny", "nano"},
    "select.score": {"excess", "loss", "all", "reference"},
} | {
    f"{section}.{name}": values
    for section in ("reference", "train")
    for name, values in (
        ("optimizer", {"adamw", "adafactor", "muon"}), ("moments_dtype", {"float32", "bfloat16"}),
        ("schedule", {"cosine", "linear", "constant", "wsd"}),
    )
}  # fmt: skip
MAY_BE_EMPTY = {"init", "split_field", "prompt", "utility", "data_dir", "score.source"}
NUMBERS = (
    math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 2.0, 0.5, 1e-320, 1e-30, 1e39, 1.0 - 1e-12,
    -1, 0, 1, 2, 7, 2**31, 2**63, 10**20, -(10**20), 10**5000, True, False, None,
)  # fmt: skip
TEXTS = (
    "", " ", "x", "\0", "a\nb", "exces", "excess", "loss", "all", "sequence", "nano", "none", "..",
    "../x", "x" * 5000, "é", "\ud800", "nan", "-1", "builtin:pages", "files:", "file:x", "bfloat16",
    "tags:number", "tags:", "relevance", "reference", "((", "{", "{a", "init",
)  # fmt: skip
OTHERS = (
    (), (1, 2), ("gsm8k",), ("",), (("loss", 1.0), ("excess", 2.0)), (("loss", math.nan),),
    (("loss",),), ((),), [["loss", 1]], (("loss", True), ("excess", "1")), {}, {"a": 1}, b"x",
)  # fmt: skip


def sensible(key: str, value: object) -> bool:
    """Whether an accepted value makes sense, whatever the schema says."""
    default, name = config_lib.flat(math_config.get_config())[key], key.split(".")[-1]
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, str):
        if not isinstance(value, str) or set(value) & {"\0", "\ud800"}:
            return False
        if key in CHOICES:
            return value in CHOICES[key]
        if name == "name":
            return value not in ("", "..") and "/" not in value
        if name == "spec":
            return value in ("builtin:pages", "builtin:problems")
        if name == "utility":
            return value in ("", "tags:number", "relevance")
        return bool(value.strip()) or (not value and not {name, key}.isdisjoint(MAY_BE_EMPTY))
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and value in ((), ("gsm8k",), OTHERS[4], OTHERS[8])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(default, int):
        lowest = 0 if name in MAY_BE_ZERO else 257 if name == "vocab_size" else 1
        sound = lowest <= value < 2**32 or (key.startswith("mesh.") and value == -1)
        return isinstance(value, int) and sound
    low, small = (0.0, float(np.float32(value))) if abs(value) < 1e38 else (0.0, math.inf)
    if not math.isfinite(small) or value < low or (name in POSITIVE and small < 1e-37):
        return False
    if name == "spike":
        return value == 0 or value > 1
    return name not in SHARES or (value <= 1 and (small < 1 or name not in BELOW_ONE))


def require_one_sentence(error: InputError) -> None:
    text = str(error)
    assert "\n" not in text
    assert 10 < len(text) < 500, text


def accepted(config: ConfigDict) -> bool:
    try:
        config_lib.validate(config)
    except InputError as error:
        require_one_sentence(error)
        return False
    for stage in STAGES:
        config_lib.bound_part(config, stage)
    config_lib.sources(config.data.corpus)
    return True


def number(rng: random.Random) -> float | int:
    if rng.random() < 0.5:
        return rng.choice((-1, 1)) * 10.0 ** rng.uniform(-45, 45)
    return rng.choice((-1, 1)) * rng.randrange(10 ** rng.randrange(1, 25))


def any_value(rng: random.Random, key: str) -> object:
    near = [value for name, value in NEAR.items() if key.endswith(name)]
    choices = (NUMBERS, TEXTS, OTHERS, (number(rng),), *near)
    return rng.choice(rng.choice(choices))


NEAR = {
    "ratio": (0.1, 0.9, 1.0), "steps": (0, 5, 100), "batch_size": (4, 16, 3), "lr": (1e-4, 10.0),
    "accumulation": (2, 4), "b1": (0.0, 0.8), "spike": (1.0, 3.0), "weight": (0.0, 3.0),
    "score": ("all", "loss"), "scope": ("shard",), "dtype": ("bfloat16",), "remat": ("full",),
}  # fmt: skip


def changed(changes: dict[str, object]) -> ConfigDict:
    c = ConfigDict(math_config.get_config().to_dict())
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = c
        for part in sections:
            section = section[part]
        del section[name]  # or the new value would be cast to the old one's type
        section[name] = value
    return c


def test_each_value_of_each_key_is_accepted_only_if_it_makes_sense():
    values = (*NUMBERS, *TEXTS, *OTHERS)
    taken = [(key, v) for key in KEYS for v in values if accepted(changed({key: v}))]
    assert not [(key, v) for key, v in taken if not sensible(key, v)]
    assert len(taken) > len(KEYS)


@pytest.mark.parametrize("seed", range(4))
def test_values_are_accepted_only_if_they_make_sense(seed):
    rng, taken = random.Random(seed), 0
    for _ in range(450):
        keys = rng.sample(KEYS, rng.choice((1, 1, 1, 2, 3)))
        changes = {key: any_value(rng, key) for key in keys}
        if accepted(changed(changes)):
            taken += 1
            assert not {key: v for key, v in changes.items() if not sensible(key, v)}
    assert taken > 20  # or nothing was tried but nonsense


@pytest.mark.parametrize("seed", range(2))
def test_command_lines_are_accepted_only_if_they_make_sense(seed, monkeypatch):
    monkeypatch.chdir(ROOT)
    rng, taken = random.Random(seed), 0
    forms = ("--config.{}={}", "--config.{}={}", "--config.{}={}", "--config.{} {}", "--config.{}",
             "-config.{}={}", "--noconfig.{}", "config.{}={}", "--config.{}==")  # fmt: skip
    for _ in range(330):
        words = ["main", "--config=configs/math.py"]
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(KEYS)
            if rng.random() < 0.2:  # a typo, or a section
                key = rng.choice((key[:-1], key.replace("e", "", 1), key.split(".")[0], ""))
            value = any_value(rng, key)
            value = "9" * 5000 if value == 10**5000 else value
            words += rng.choice(forms).format(key, value).split(" ", 1)
        try:
            found = config_file.parse(words, {"workdir": ""}).config
            config_lib.validate(found)
        except InputError as error:
            require_one_sentence(error)
            continue
        taken += 1
        assert all(sensible(key, value) for key, value in config_lib.flat(found).items()), words
    assert taken > 20


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("data.corpus", "data.clean")])
def test_the_defaults_and_their_neighbours_are_accepted(key):
    c = math_config.get_config()
    value = config_lib.flat(c)[key]
    if isinstance(value, float) and value < 0.99:
        c.update_from_flattened_dict({key: value + 0.001 if key[-5:] != "spike" else 4.0})
    config_lib.validate(c)
    assert sensible(key, config_lib.flat(c)[key])


def test_validate_takes_no_time():
    c = math_config.get_config()
    config_lib.validate(c)
    start = time.perf_counter()
    for _ in range(5):
        config_lib.validate(c)
    assert (time.perf_counter() - start) / 5 < 0.05


def test_the_page_is_that_of_the_schema():
    assert (ROOT / "docs" / "config.md").read_text() == config_schema.page(), (
        "docs/config.md is of another schema: `python -m rho1_jax.config > docs/config.md`."
    )


def test_every_key_is_in_the_default_config_once_and_says_what_it_is():
    keys = [entry.key for entry in ENTRIES]
    assert len(set(keys)) == len(keys)
    c = tiny_config.get_config()
    sections = {"data.corpus", "data.clean"}
    with_domain = {k.replace(".noisy.", ".*.").replace(".clean.clean.", ".clean.*.")
                   for k in config_lib.flat(c)}  # fmt: skip
    assert with_domain == set(keys) - sections
    assert all(entry.meaning.endswith(".") and entry.kind.allowed for entry in ENTRIES)
    for entry in ENTRIES:
        assert entry.binds in (FREE, ("score",), *(STAGES[i:] for i in range(4))), entry.key


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"seed": 1}, STAGES),
        ({"data.seq_len": 64}, STAGES),
        ({"data.corpus.noisy.spec": "files:other.jsonl"}, STAGES),
        ({"data.corpus.noisy.weight": 2.0}, ("train",)),
        ({"data.clean.clean.weight": 2.0}, STAGES[1:]),
        ({"model.dtype": "bfloat16"}, STAGES[1:]),
        ({"reference.lr": 1.0}, STAGES[1:]),
        ({"score.cached": False}, STAGES[2:]),
        ({"score.entropy": True}, ("score",)),
        ({"select.utility": "tags:number"}, STAGES[2:]),
        ({"select.utility": "relevance"}, STAGES[2:]),  # which binds other keys
        ({"select.scope": "shard"}, ("train",)),
        ({"select.ratio": 0.5}, ("train",)),
        ({"train.steps": 9, "train.batch_size": 16, "train.spike": 3.0}, ("train",)),
        ({"mesh.data": 1, "mesh.fsdp": -1, "checkpoint.every": 3, "log_every": 2}, ()),
        ({"score.batch_size": 16, "loss_chunk_tokens": 64, "model.remat": "full"}, ()),
        ({"eval.tasks": ("gsm8k",), "eval.rows": 4, "name": "other", "data.root": "/else"}, ()),
        ({"train.accumulation": 2, "reference.accumulation": 2, "train.most_bad_steps": 5}, ()),
    ],
)
def test_what_a_key_decides(changes, stages):
    c, other = (ConfigDict(tiny_config.get_config().to_dict()) for _ in range(2))
    other.update_from_flattened_dict(changes)
    parts = [[config_lib.bound_part(x, stage) for x in (c, other)] for stage in STAGES]
    differ = [config_lib.first_difference(*pair) for pair in parts]
    assert tuple(s for s, found in zip(STAGES, differ, strict=True) if found) == stages
    assert all(found is None or found.split(" ")[0] in changes for found in differ)


@pytest.mark.parametrize(
    ("select", "key", "decides"),
    [
        ({}, "train.accumulation", False),
        ({"scope": "microbatch"}, "train.accumulation", True),
        ({"scope": "shard"}, "train.accumulation", True),
        ({"scope": "sequence"}, "train.accumulation", False),
        ({"scope": "sequence", "score": "middle"}, "train.accumulation", True),
        ({"scope": "microbatch", "score": "all"}, "train.accumulation", False),
        ({"scope": "shard"}, "mesh.data", True),
        ({}, "mesh.data", False),
        ({"utility": "relevance"}, "score.batch_size", False),
        ({}, "score.batch_size", False),
    ],
)
def test_keys_that_decide_where_others_say_so(select, key, decides):
    c = ConfigDict(tiny_config.get_config().to_dict())
    c.select.update(**select)
    assert (key in config_lib.bound_part(c, "train")) == decides


def test_a_bound_part_is_plain_and_a_domain_more_is_a_difference():
    c = ConfigDict(tiny_config.get_config().to_dict())
    before = config_lib.bound_part(c, "train")
    assert before["select.parts"] == []
    c.data.corpus.more = config_lib.source("files:more.jsonl")
    found = config_lib.first_difference(before, config_lib.bound_part(c, "train"))
    assert found == "data.corpus.more.prompt ('nothing', '')"
