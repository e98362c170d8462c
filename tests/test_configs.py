"""Every official config builds, locks, refuses a typo, and takes two steps at debug size."""

import json
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import domain, general, math, sft
from rho1_jax import config as config_lib
from rho1_jax import jsonfile, main
from rho1_jax.errors import InputError
from rho1_jax.pipeline import workspace
from tests.tiny_config import write_texts

CONFIGS = {
    "math": math.get_config,
    "math:smollm2": lambda: math.get_config("smollm2"),
    "math:tinyllama": lambda: math.get_config("tinyllama"),
    "math:mistral": lambda: math.get_config("mistral"),
    "general": general.get_config,
    "domain:medicine": lambda: domain.get_config("medicine"),
    "sft": sft.get_config,
    "sft:tora,slm": lambda: sft.get_config("tora,slm"),
    "sft:chat": lambda: sft.get_config("chat"),
}
MORE = {name: lambda n=name: sft.get_config(n) for name in ("tora", "qa,slm", "chat,slm")}
GOLDEN = CONFIGS | {f"sft:{name}": of for name, of in MORE.items()}
FOLDER = Path(__file__).parent / "golden" / "configs"


def shrink(config: ConfigDict, root: str) -> ConfigDict:
    """The same experiment at debug size: a tiny shape, tiny text, two steps."""
    c = ConfigDict(config.to_dict())
    c.model.update(preset="nano", init="")
    c.tokenizer.update(source="train", vocab_size=300)
    c.data.update(root=root, seq_len=32)
    for domains, name in ((c.data.corpus, "noisy"), (c.data.clean, "clean")):
        for text in domains.values():
            text.update(spec=f"files:{name}.jsonl", text="text", split_field="split", prompt="")
    for section in (c.reference, c.train):
        section.update(steps=2, batch_size=8, warmup_steps=1)
    c.score.batch_size = 8
    c.eval.rows = 8
    return c


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_locks_and_validates(name):
    c = CONFIGS[name]()
    config_lib.validate(c)
    with pytest.raises(AttributeError, match="select"):
        c.selct = 1


def golden_file(name: str) -> Path:
    return FOLDER / f"{name.replace(':', '-').replace(',', '-')}.txt"


def expanded(config: ConfigDict) -> str:
    """Every key and its value, a line each."""
    return "".join(f"{key} = {value!r}\n" for key, value in config_lib.flat(config).items())


@pytest.mark.parametrize("name", GOLDEN)
def test_expands_to_the_golden_file(name):
    assert expanded(GOLDEN[name]()) == golden_file(name).read_text(), (
        f"{name} is another config than {golden_file(name)} says; if that is meant, "
        "`python -m tests.test_configs` renews the files: commit what changed."
    )


def test_every_golden_file_is_of_a_config():
    assert set(FOLDER.glob("*")) == {golden_file(name) for name in GOLDEN}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # The other sizes of math differ in numbers that debug size takes away.
    [pytest.param(n, marks=pytest.mark.nightly) if "math:" in n else n for n in CONFIGS],
)
def test_two_steps_at_debug_size(name, tmp_path):
    config = shrink(CONFIGS[name](), str(write_texts(tmp_path / "text")))
    main.run(config, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["selection"]["ratio"] == config.select.ratio
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select.ratio": 0.0}, "select.ratio is 0.0"),
        ({"select.ratio": 1.5}, "at most 1"),
        ({"select.score": "exces"}, "did you mean excess"),
        ({"train.steps": 0}, "train.steps is 0"),
        ({"reference.steps": 0, "reference.epochs": 0.0}, "reference.steps is 0"),
        ({"train.lr": -1.0}, "train.lr is -1.0"),
        ({"data.seq_len": 0}, "data.seq_len is 0"),
        ({"eval.every": 0}, "eval.every is 0"),
        ({"train.backward_rows_top": -1}, "0 to 10,000, for instance 0"),
        ({"train.backward_rows_top": 1, "select.ratio": 1.0}, "select.ratio below 1"),
        ({"train.backward_rows_top": 1, "select.score": "all"}, "every token weighs"),
        ({"train.backward_rows_top": 1, "select.unselected_weight": 0.1}, "unselected_weight to 0"),
        ({"train.backward_rows_top": 5}, "model.preset=tiny has 4 blocks"),
        ({"select.ref_ema_decay": 0.0}, "select.ref_ema_decay is 0.0"),
        ({"select.ref_ema_decay": 0.9, "select.score": "loss"}, "reads no reference"),
        ({"select.ref_ema_decay": 0.9, "select.score": "all"}, "reads no reference"),
        ({"select.ref_ema_init": "polcy"}, "did you mean policy"),
        ({"select.score": "utility"}, "set select.utility"),
        ({"select.utility": "relevanc"}, "did you mean relevance"),
        ({"select.utility": "tags"}, "tags:number,latex"),
        ({"select.utility": "tags:nmber"}, "did you mean number"),
        ({"select.score": "combined"}, "name at least two"),
        ({"select.parts": (("loss", 1.0), ("entropi", 1.0))}, "did you mean entropy"),
        ({"select.parts": (("loss", float("nan")),)}, "the weight of loss is nan"),
        (
            {"select.score": "combined", "select.parts": (("loss", 0.0), ("excess", 0.0))},
            "add up to 0",
        ),
        ({"select.domain_ratios": (("page", 0.5),)}, "the domain 'page' .* did you mean pages"),
        ({"select.domain_ratios": (("pages", 0.0),)}, "that of 'pages' is 0.0"),
        ({"select.domain_ratios": (("pages", 1.0),) * 2}, "must be pairs of domain and ratio"),
        (
            {"select.domain_ratios": (("pages", 1.0),), "select.score": "all"},
            "select.score=all selects none",
        ),
        ({"select.ratio": 1e-4}, "keeps none; set it to 0.00049"),
        ({"select.ratio": 0.001, "select.scope": "sequence"}, "keeps none; set it to 0.0039"),
        ({"train.accumulation": 3}, "do not divide over train.accumulation=3"),
        ({"train.batch_size": 2**23}, "2147483648 tokens or more"),
        ({"mesh.fsdp": -1}, "More than one axis of mesh"),
        ({"data.corpus.pages.weight": 0.0}, "no domain to train on"),
        ({"data.clean.problems.weight": 0.0}, "data.clean names no corpus of a weight above 0"),
        ({"data.corpus.pages.weight": -1.0}, "data.corpus.pages.weight is -1.0"),
        ({"data.corpus.pages.spec": "file:*"}, "it must be files:GLOB"),
        ({"model.remat": "dot"}, "did you mean dots"),
        ({"model.preset": "tinny"}, "did you mean tiny"),
        ({"tokenizer.vocab_size": 0}, "from 257 to 1,000,000, for instance 257"),
        ({"train.b1": 2.0}, "at least 0 and below 1, for instance 0.9"),
        ({"train.b2": 1.0 - 1e-12}, "below 1, for instance 0.95"),
        ({"train.optimizer": "adam"}, "train.optimizer 'adam' is not known: did you mean adamw"),
        ({"reference.optimizer": "moun"}, "did you mean muon"),
        ({"train.moments_dtype": "bf16"}, "did you mean bfloat16|choose one of float32, bfloat16"),
        ({"train.schedule": "cosin"}, "did you mean cosine"),
        ({"train.schedule": "wsd"}, "train.decay_steps is 0, with train.schedule=wsd"),
        ({"train.decay_steps": 5}, "train.decay_steps is 5, with train.schedule=cosine"),
        ({"train.schedule": "wsd", "train.decay_steps": 281}, "at most as many as are left"),
        ({"data.weight_changes": ((0.5, "page", 1.0),)}, "did you mean pages"),
        ({"data.weight_changes": ((1.0, "pages", 1.0),)}, "a share is 1.0"),
        ({"data.weight_changes": ((0.5, "pages", -1.0),)}, "the weight of pages is -1.0"),
        ({"data.weight_changes": (("pages", 1.0),)}, "share of training, domain, weight"),
        ({"data.weight_changes": ((0.5, "pages", 0.0),)}, "no domain a weight above 0 from 0.5 on"),
        ({"train.spike": 0.5}, "a finite number above 1, or 0"),
        ({"train.steps": 10**20}, "for instance 1000000000"),
        ({"seed": 10**20}, "seed is 1"),
        ({"seed": True}, "seed is True: it must be a whole number"),
        ({"name": ""}, "name is ''"),
        ({"name": "../x"}, "a name without slashes"),
        ({"eval.tasks": (1,)}, "eval.tasks is .* names"),
    ],
)
def test_values_no_stage_could_use(changes, words):
    c = math.get_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=words):
        config_lib.validate(c)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("select", 5, "did you mean select."),
        ("select.floor", 0.1, "select.floor is called select.unselected_weight now"),
        ("selct", 5, "'selct' is not a key"),
        ("data.corpus", "files:*", "domains by name"),
        ("data.corpus.web", "files:*", "write config.source"),
        ("data.corpus.web", ConfigDict({"spec": "files:*"}), "write config.source"),
        ("data.corpus.a/b", config_lib.source("files:*"), "name of a domain .* is 'a/b'"),
        ("data.clean.pages", config_lib.source("files:*"), "name different sources"),
    ],
)
def test_a_config_of_another_form(place, value, words):
    c = ConfigDict(math.get_config().to_dict())
    *sections, name = place.split(".")
    section = c
    for part in sections:
        section = section[part]
    with c.ignore_type():
        section[name] = value
    with pytest.raises(InputError, match=words):
        config_lib.validate(c)


def test_weights_of_a_repeated_part_add_up():
    c = math.get_config()
    c.select.score = "combined"
    c.select.parts = (("loss", 1.0), ("entropy", 1.0), ("loss", 0.5))
    config_lib.validate(c)
    assert config_lib.selection(c, n_shards=1).parts == (("loss", 1.5), ("entropy", 1.0))


def test_a_mixture_in_stages():
    c = ConfigDict(math.get_config().to_dict())
    c.data.corpus.problems = config_lib.source("builtin:problems", weight=0.0)
    c.data.weight_changes = ((0.9, "pages", 0.0), (0.5, "problems", 3.0))
    config_lib.validate(c)
    later = [(50, {"pages": 1.0, "problems": 3.0}), (90, {"pages": 0.0, "problems": 3.0})]
    assert workspace.mixture(c, "train", 100) == {
        "weights": {"pages": 1.0, "problems": 0.0}, "later": later, "batch_size": 8, "seed": 0
    }  # fmt: skip
    assert workspace.mixture(c, "reference", 100)["later"] == []


def test_no_clean_text_for_a_score_that_needs_a_reference():
    c = ConfigDict(math.get_config().to_dict())
    c.data.clean = ConfigDict()
    with pytest.raises(InputError, match="data.clean names no corpus"):
        config_lib.validate(c)
    c.select.score = "all"
    config_lib.validate(c)
    c.select.update(score="utility", utility="relevance")
    c.reference.init = "some/model"
    with pytest.raises(InputError, match="likeness to the clean text"):
        config_lib.validate(c)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("select.ratoi=0.5", "select.ratio"), ("trian.steps=3", "train.steps"), ("sed=1", "seed")],
)
def test_a_typo_names_the_nearest_key(override, nearest):
    with pytest.raises(InputError, match=f"did you mean --config.{nearest}"):
        main.parse(["main", "--config=configs/math.py", f"--config.{override}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("select.floor=0.1", "is called --config.select.unselected_weight now"),
        ("select.decay=0.9", "is called --config.select.ref_ema_decay now"),
        ("select.average_of=reference", "is called --config.select.ref_ema_init now"),
        ("data.corpus={}", "is a section"),
        ("train.lr=nan", "train.lr is nan"),
        ("seed=" + "9" * 5000, "seed"),
    ],
)
def test_an_override_that_is_none(override, words):
    with pytest.raises(InputError, match=words) as raised:
        main.parse(["main", "--config=configs/math.py", f"--config.{override}"])
    assert len(str(raised.value)) < 400


def test_unknown_variant_names_the_nearest():
    with pytest.raises(InputError, match="did you mean tinyllama"):
        math.get_config("tinylama")


@pytest.mark.parametrize("name", ["select_ratio", "scope", "lr", "seed"])
def test_every_row_of_a_sweep_is_a_valid_config_of_its_own(name):
    rows = {}
    for row, changes in math.sweep(name):
        c = math.get_config()
        c.update_from_flattened_dict(changes)
        config_lib.validate(c)
        rows[row] = jsonfile.digest(config_lib.bound_part(c, "train"))
    assert len(set(rows.values())) == len(rows) > 1
    with pytest.raises(InputError, match="did you mean select_ratio"):
        next(math.sweep("select_rato"))


def test_devices_are_simulated():
    assert jax.device_count() == 8  # or the sharded tests would test nothing


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*"):
        old.unlink()
    for name, of in GOLDEN.items():
        golden_file(name).write_text(expanded(of()))
