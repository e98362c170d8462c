"""Every official config builds, locks, refuses a typo, and takes two steps at debug size."""

import json

import jax
import pytest
from ml_collections import ConfigDict

from configs import domain, general, math, sft
from rho1_jax import config as config_lib
from rho1_jax import main
from rho1_jax.errors import InputError
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
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
        ({"train.lr": -1.0}, "train.lr is -1.0"),
        ({"data.seq_len": 0}, "data.seq_len is 0"),
        ({"eval.every": 0}, "eval.every is 0"),
        ({"train.backward_rows_top": -1}, "0 is exact"),
        ({"train.backward_rows_top": 1, "select.ratio": 1.0}, "select.ratio below 1"),
        ({"train.backward_rows_top": 1, "select.score": "all"}, "every token is selected"),
        ({"train.backward_rows_top": 1, "select.floor": 0.1}, "select.floor to 0"),
        ({"select.decay": 0.0}, "select.decay is 0.0"),
        ({"select.average_of": "polcy"}, "did you mean policy"),
        ({"select.score": "utility"}, "set select.utility"),
        ({"select.utility": "relevanc"}, "did you mean relevance"),
        ({"select.utility": "tags"}, "tags:number,latex"),
        ({"select.utility": "tags:nmber"}, "did you mean number"),
    ],
)
def test_values_no_stage_could_use(changes, words):
    c = math.get_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=words):
        config_lib.validate(c)


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
        rows[row] = config_lib.digest(config_lib.bound_part(c))
    assert len(set(rows.values())) == len(rows) > 1
    with pytest.raises(InputError, match="did you mean select_ratio"):
        next(math.sweep("select_rato"))


def test_devices_are_simulated():
    assert jax.device_count() == 8  # or the sharded tests would test nothing
