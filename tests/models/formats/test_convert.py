"""Exported folders: the files, the model card, the command line."""

import json
import shutil

import jax
import numpy as np
import pytest

from rho1_jax.models import llama, tokenizer
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import convert, load
from rho1_jax.slm import step
from rho1_jax.training import checkpoint, optimizer
from rho1_jax.training.checkpoint import Checkpoints

CONFIG = {
    "model": {"init": "someone/base", "preset": "tiny"},
    "data": {
        "seq_len": 64,
        "corpus": {"web": {"spec": "files:web/*", "weight": 2.0}},
        "clean": {"math": {"spec": "builtin:problems", "weight": 1.0}},
    },
    "reference": {"init": ""},
    "select": {"score": "excess", "ratio": 0.6, "scope": "batch"},
    "train": {"lr": 8e-5},
}
METRICS = "step,tokens,selected_share\n1,100,0.5\n2,200,\n10,1000,0.6\n".replace("200,", "200,0.6")
EVAL = {"policy": {"math": {"loss": 1.25, "bits_per_byte": 0.5}},
        "initial": {"math": {"loss": 2.5, "bits_per_byte": 1.0}}}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a policy of random weights."""
    folder = tmp_path_factory.mktemp("run")
    tok = tokenizer.train(["some text to learn from"] * 3, 280)
    config = Architecture(
        vocab_size=tok.vocab_size, width=8, n_layers=2, n_heads=1, n_kv_heads=1, head_dim=8,
        ffn_width=8, max_length=64,
    )  # fmt: skip
    params = llama.init(config, jax.random.key(0))
    tx = optimizer.of("adamw", lambda _: 1e-2, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0)
    checkpoint.write_model_file(folder / "checkpoints", config, tok)
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, step.init_state(params, tx), {})
    checkpoint.write_model_link(folder / "reference", "someone/reference")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "eval.json").write_text(json.dumps(EVAL))
    return folder


def test_a_run_becomes_a_folder_that_loads_bit_for_bit(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert.main(["", f"--checkpoint={run}", f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "README.md",
    }  # fmt: skip
    (params, config, tok), (again, same, other) = load.load(run), load.load(out)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (same, other.fingerprint) == (config, tok.fingerprint)
    ends = json.loads((out / "generation_config.json").read_text())
    assert ends["eos_token_id"] == [tok.separator_id]
    assert ends["pad_token_id"] == tok.separator_id
    # A model that was already exported can be again, in half the bytes.
    half = tmp_path / "half"
    assert convert.main(["", f"--checkpoint={out}", f"--out={half}", "--dtype=bfloat16"]) == 0
    assert "| made from |" in (half / "README.md").read_text()
    rounded = load.load(half)[0]["embed"]
    np.testing.assert_array_equal(rounded, params["embed"].astype("bfloat16").astype("f4"))


def test_the_card_says_what_the_run_knows(run):
    _, config, _ = load.load(run)
    card = convert.model_card(str(run), config, name="mine", dtype="float32")
    for line in (
        "base_model: someone/base", "# mine", "| base model | someone/base |",
        "| corpus | web (files:web/*, weight 2) |",
        "| clean text of the reference | math (builtin:problems, weight 1) |",
        "| score | excess, scope batch |", "| ratio | 0.6 |", "| tokens seen | 1,000 |",
        "| tokens selected | 590 |",  # 0.5 of the first 100, 0.6 of the rest
        "| this model | math | 1.250 | 0.500 |", "| initial | math | 2.500 | 1.000 |",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
    ):  # fmt: skip
        assert line in card.splitlines(), line


def test_the_card_says_what_entered_the_loss(run, tmp_path):
    """In the words of the evaluation where it has any; and of a reference only if there is one."""
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    shutil.rmtree(plain / "reference")
    config = CONFIG | {"select": CONFIG["select"] | {"score": "all"}}
    (plain / "config.json").write_text(json.dumps(config))
    architecture = load.describe(run).architecture
    card = convert.model_card(str(plain), architecture, name="mine", dtype="float32")
    assert "| entered the loss | every token |" in card.splitlines()
    assert "reference" not in card
    assert "| ratio |" not in card
    said = "The 60% of tokens with the highest excess loss; the others with weight 0.5."
    (plain / "eval.json").write_text(json.dumps(EVAL | {"selection": {"said": said}}))
    card = convert.model_card(str(plain), architecture, name="mine", dtype="float32")
    assert f"| entered the loss | {said} |" in card.splitlines()
    assert "every token" not in card


def test_bad_input_is_one_sentence(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert convert.main(["", f"--checkpoint={run}", f"--out={tmp_path}"]) == 2
    assert "is not empty: give --out a new folder" in capsys.readouterr().err
    assert convert.main(["", f"--checkpoint={tmp_path}", f"--out={tmp_path / 'new'}"]) == 2
    assert "is not a model" in capsys.readouterr().err
