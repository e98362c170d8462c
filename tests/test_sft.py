"""Fine-tuning of a run's model on questions and answers: learns, resumes, exports."""

import json
import random

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import sft
from rho1_jax import main
from rho1_jax.data import loader
from rho1_jax.errors import InputError
from rho1_jax.models.formats import convert, load
from rho1_jax.training import checkpoint
from tests import tiny_config
from tests.tiny_config import WORDS, write_texts

SIZES = {"batch_size": 8, "warmup_steps": 2, "lr": 3e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained run of two steps."""
    root = write_texts(tmp_path_factory.mktemp("text"))
    c = ConfigDict(tiny_config.get_config().to_dict())
    c.data.root = str(root)
    c.select.update(score="all", ratio=1.0)
    c.train.update(steps=2, **SIZES)
    c.score.batch_size = 8
    folder = tmp_path_factory.mktemp("base")
    main.run(c, folder, ("prepare", "train"))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """What follows a word, for a few words: something that can be learnt."""
    folder = tmp_path_factory.mktemp("questions")
    rng = random.Random(0)
    for name in ("sft", "sft_clean"):
        (folder / name).mkdir()
        with (folder / name / "a.jsonl").open("w") as f:
            for i in range(400):
                word = rng.randrange(len(WORDS))
                row = {"question": f"After {WORDS[word]}?", "answer": WORDS[word - 1]}
                f.write(json.dumps(row | {"split": "val" if i % 10 == 0 else "train"}) + "\n")
    return folder


def tuning(base, questions, variant="qa", **changes):
    c = ConfigDict(sft.get_config(variant).to_dict())
    c.model.init = str(base)
    c.data.update(root=str(questions), seq_len=32)
    for domains in (c.data.corpus, c.data.clean):
        for domain in domains.values():
            domain.split_field = "split"
    for section in (c.reference, c.train):
        section.update(**SIZES)
    c.score.batch_size = 8
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.slow
def test_heldout_loss_falls_resumes_and_exports(base, questions, tmp_path, capsys):
    run = tmp_path / "run"
    main.run(tuning(base, questions), run)
    evals = json.loads((run / "eval.json").read_text())
    assert evals["policy"]["sft"]["loss"] < 0.7 * evals["initial"]["sft"]["loss"]
    rows = loader.open_rows(run / "data", "sft", "train")
    steps = len((run / "metrics.csv").read_text().splitlines()) - 1
    assert steps == -(-3 * len(rows) // 8)  # three epochs
    capsys.readouterr()
    main.run(tuning(base, questions), run)
    assert f"train: finished at step {steps}, skipped" in capsys.readouterr().out

    convert.main(["", f"--checkpoint={run}", f"--out={tmp_path / 'exported'}"])
    ours, _, _ = checkpoint.load_model(run)
    exported, _, _ = load.load(tmp_path / "exported")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exported, ours)


@pytest.mark.slow
def test_token_cleaning_selects_among_answers(base, questions, tmp_path):
    run = tmp_path / "run"
    main.run(tuning(base, questions, "qa,slm", **{"train.steps": 3, "reference.steps": 3}), run)
    lines = (run / "metrics.csv").read_text().splitlines()
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert float(first["tokens"]) < 0.5 * 8 * 32  # answers are the smaller part of the text
    assert float(first["selected_share"]) == pytest.approx(0.6, abs=0.01)


def test_variants_are_known():
    for variant in ("qb", "qa,clm"):
        with pytest.raises(InputError, match=r"configs/sft.py variant"):
            sft.get_config(variant)
