"""A selection as a dataset: transformers' Trainer, by the lines of the docs, has our first loss."""

import csv
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from rho1_jax import export_scores, main
from rho1_jax.models import tokenizer
from rho1_jax.models.formats import convert
from rho1_jax.pipeline import models
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import sharding
from tests import tiny_config

ROOT = Path(__file__).parent.parent
CLEAN, ROWS, STEPS = "clean", 8, 3
RATIOS = 0.6, 0.45, 0.3  # of each step


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that was trained on two domains, one of them always, and its config."""
    folder, config = tmp_path_factory.mktemp("run"), tiny_config.get_config()
    config.data.root = str(tiny_config.write_texts(folder / "text"))
    config.train.update(steps=STEPS, batch_size=ROWS)
    with config.unlocked():
        config.data.corpus[CLEAN] = config.data.clean[CLEAN]
    config.select.domain_ratios = ((CLEAN, 1.0),)
    config.select.update(final_ratio=RATIOS[-1])
    config.select.update(distill_weight=0.5, distill_top=4)  # which is no part of what is exported
    main.run(config, folder, ("prepare", "reference", "score", "train"))
    return folder, config


def columns_of(out):
    pq = pytest.importorskip("pyarrow.parquet")
    return pq.read_table(out / "data").to_pydict()


def test_the_columns_say_what_is_selected_and_where_it_lies(finished, tmp_path, capsys):
    (folder, _), few = finished, ("--model=policy", "--steps=2")
    assert export_scores.main(["", str(folder), str(tmp_path / "out"), few[0]]) == 0
    assert f"{STEPS} steps of {ROWS} rows" in capsys.readouterr().out
    c = columns_of(tmp_path / "out")
    assert c["step"] == sorted([*range(STEPS)] * ROWS)
    tokens, labels, ref_loss = (np.array(c[n]) for n in ("input_ids", "labels", "ref_loss"))
    kept, clean = labels != export_scores.IGNORED, np.array(c["domain"]) == CLEAN
    np.testing.assert_array_equal(labels[kept], tokens[kept])
    assert not kept[:, 0].any()
    assert kept[clean, 1:].all()
    step = np.array(c["step"])
    shares = [kept[~clean & (step == i), 1:].mean() for i in range(STEPS)]
    np.testing.assert_allclose(shares, RATIOS, atol=0.01)
    assert np.isnan(ref_loss[:, 0]).all()
    assert np.load(folder / "scores" / CLEAN / "ref_top.npy").any()
    stored = np.load(folder / "scores" / CLEAN / "ref_loss.npy")
    rows = np.array(c["row"])
    np.testing.assert_array_equal(ref_loss[clean, 1:], stored[rows[clean]].astype(np.float32))
    assert export_scores.main(["", str(folder), str(tmp_path / "two"), *few]) == 0
    assert columns_of(tmp_path / "two")["labels"] == c["labels"][: 2 * ROWS]
    tok = tokenizer.load(folder / "data")
    for ids, document, start, end in zip(
        *(np.array(c[n]) for n in ("input_ids", "document", "byte_start", "byte_end")), strict=True
    ):
        for number in range(document.max() + 1):
            here = document == number
            text = tok.decode(ids[here][ids[here] != tok.separator_id])
            assert start[here][0] == 0
            assert end[here][-1] == len(text.encode())
            np.testing.assert_array_equal(start[here][1:], end[here][:-1])


def test_the_trainer_of_transformers_has_our_first_loss(finished, tmp_path, monkeypatch):
    """The lines of docs/scores.md, as they stand there."""
    pytest.importorskip("datasets")
    folder, config = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        ws = Workspace(config, folder, mesh)
        params, shape = models.initial(ws)
        convert.export(Path("start"), params, shape, ws.tokenizer, card="")
    assert export_scores.main(["", str(folder), "selected", "--steps=1"]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scores.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    with (folder / "metrics.csv").open() as file:
        ours = next(csv.DictReader(file))
    theirs = names["trained"].training_loss
    assert theirs == pytest.approx(float(ours["loss_selected"]), abs=1e-5)
    assert abs(theirs - float(ours["loss"])) > 1e-3  # or the selection would not matter


def test_what_cannot_be_exported_is_one_sentence(finished, tmp_path, capsys):
    folder, _ = finished
    for words, sentence in (
        ([str(tmp_path), "new"], "not the folder of a run"),
        ([str(folder), str(folder)], "is not empty"),
        ([str(folder), str(tmp_path / "new"), "--steps=-1"], "--steps is -1"),
    ):
        assert export_scores.main(["", *words]) == 2
        assert sentence in capsys.readouterr().err
