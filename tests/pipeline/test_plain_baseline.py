"""--baseline: the plain baseline beside a run, in the same command and page."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from rho1_jax import check, main
from rho1_jax import config as config_lib
from rho1_jax.analysis import records
from rho1_jax.errors import InputError
from rho1_jax.pipeline import baseline
from rho1_jax.pipeline.workspace import BASELINE, Options
from rho1_jax.training.checkpoint import load_model
from tests import tiny_config

WITH = Options(baseline=True)


def config(texts, **changes):
    """SLM without a reference, so that there is little to train."""
    c = tiny_config.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    few = {"data.root": str(texts), "select.score": "loss", "train.steps": 4, "eval.every": 4}
    c.update_from_flattened_dict(few | changes)
    return c


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    main.run(config(texts), folder, options=WITH)
    return folder


def test_both_start_from_one_model_and_read_the_same_rows(run):
    ours, theirs = (records.read_metrics(f / "metrics.csv") for f in (run, run / BASELINE))
    np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
    assert ours["loss"][0] == theirs["loss"][0]
    assert ours["loss"][-1] != theirs["loss"][-1]
    assert (theirs["selected_share"] == 1.0).all()
    initial = (json.loads((f / "eval.json").read_text())["initial"] for f in (run, run / BASELINE))
    assert next(initial) == next(initial)


def test_the_report_shows_whether_it_helped(run):
    page = (run / "report.html").read_text()
    first = page[page.index("<main>") : page.index("<section>")]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", first))
    assert "the baseline&#39;s on" in text
    assert "In the baseline, every token entered the loss." in text
    assert "Both saw 1.02k training tokens" in text


def test_it_resumes_and_what_it_keeps_is_whole(texts, run, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(run, again, symlinks=True)
    shutil.rmtree(again / BASELINE / "checkpoints" / "steps" / "4")
    main.run(config(texts), again, options=WITH)
    said = capsys.readouterr().out
    assert "\ntrain: finished at step 4, skipped" in said
    assert "\nbaseline train: resumes at step 2" in said
    for name in ("metrics.csv", "heldout.csv"):
        lines = [(f / BASELINE / name).read_text().splitlines() for f in (run, again)]
        assert len(lines[0]) == len(lines[1])
    models = (load_model(f / BASELINE)[0] for f in (run, again))
    jax.tree.map(np.testing.assert_array_equal, *models)
    assert check.main(["", str(again)]) == 0
    (again / BASELINE / "eval.json").write_text("{")
    assert check.main(["", str(again)]) == 1


def test_it_is_what_select_score_all_trains(texts):
    changes = {
        "select__ref_ema_decay": 0.9, "select__score": "excess", "select__schedule": "cosine",
        "select__final_ratio": 0.2, "train__backward_rows_top": 1,
    }  # fmt: skip
    plain = baseline.config(config(texts, **changes))
    config_lib.validate(plain)
    alone = config(texts, select__score="all", select__ratio=1.0)
    bound = [config_lib.bound_part(c, "train") for c in (plain, alone)]
    assert bound[0] == bound[1]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"select__score": "all"}, WITH, "is this run itself"),
        ({"select__ratio": 1.0}, WITH, "is this run itself"),
        ({}, WITH._replace(compare="RUN"), "both given"),
        ({}, Options(profile=(3, 9)), "the training has 4 steps only"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(changes, options, words, texts, tmp_path):
    if options.compare:
        (tmp_path / "eval.json").touch()
        options = options._replace(compare=str(tmp_path))
    with pytest.raises(InputError, match=words):
        main.run(config(texts, **changes), tmp_path / "run", options=options)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_dry_run_counts_it(texts, tmp_path, capsys):
    main.run(config(texts), tmp_path / "alone", dry_run=True)
    main.run(config(texts), tmp_path / "both", options=WITH, dry_run=True)
    alone, both = capsys.readouterr().out.split("plan:")[1:]
    assert "baseline    4 steps of 256 tokens, 1,024 in all" in both
    flops, disk = (
        [float(re.search(rf"{name} +([\d.e+]+)", text)[1]) for text in (alone, both)]
        for name in ("FLOPs", "disk")
    )
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)
    assert disk[1] == pytest.approx(2 * disk[0], rel=0.01)
    assert not (tmp_path / "both" / BASELINE).exists()
