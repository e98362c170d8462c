"""Every experiment runs two steps and writes its table, figure and summary; then the one page."""

import csv
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import all as everything
from experiments import finetuning, general_pretraining, self_reference, weak_to_strong
from experiments.lab import pool, results, tables
from experiments.lab.study import Study
from rho1_jax.errors import InputError

ROOT = Path(__file__).parent.parent.parent
COMPARISONS = ("math_pretraining", "general_pretraining", "self_reference", "select_ratio",
               "weak_to_strong", "scoring_functions", "schedules", "utility_scores",
               "finetuning")  # fmt: skip
OF_EACH_KIND = ("token_dynamics", "math_pretraining", "downstream_correlation", "selected_tokens",
                "rows_quality", "finetuning")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [OF_EACH_KIND, pytest.param(everything.NAMES, marks=pytest.mark.nightly)], ids=len
)
def test_two_steps_of_experiments_and_the_page(names, folder, tmp_path):
    for domain in ("web", "code", "math"):
        shutil.copytree(folder / "data" / "corpus", folder / "data" / domain, dirs_exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    options = ["--scale=debug", "--seeds=1", f"--data={folder / 'data'}", f"--out={tmp_path}"]
    code = (
        "import sys; from experiments import all as everything; from experiments.lab import study; "
        f"everything.NAMES = {names}; sys.exit(study.main(everything.run, sys.argv, None))"
    )
    line = [sys.executable, "-c", code, *options]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is left out" not in done.stdout
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") >= len(names)
    for name in names:
        assert f'<section id="{name}">' in page
        with (tmp_path / name / "results.csv").open() as f:
            rows = list(csv.DictReader(f))
        assert all(np.isfinite(float(row["loss"])) for row in rows if row.get("loss"))
        assert f"python -m experiments.{name}" in (tmp_path / name / "summary.md").read_text()
        assert list((tmp_path / name).glob("*.png"))
    for name in set(COMPARISONS) & set(names):
        table = (tmp_path / name / "summary.md").read_text()
        for control in ("CLM", "random selection", "CLM on corpus + clean", "(reference)"):
            assert f"| {control} |" in table


def test_the_page_holds_tables_and_pictures(tmp_path):
    folder = tmp_path / "select_ratio"
    folder.mkdir()
    (folder / "figure.png").write_bytes(b"picture")
    table = tables.markdown(("", "here <b>"), [("a", ""), ("b", "1.5")])
    (folder / "summary.md").write_text(f"{table}\n\n![x](figure.png)\n\n`command`, seeds\n")
    page = everything.page(tmp_path, ["select_ratio"])
    cells = re.sub(r"\s*</?t(head|body)>\s*|\n", "", page)
    assert "<tr><th></th><th>here &lt;b&gt;</th></tr><tr><td>a</td><td></td></tr>" in cells
    assert 'src="data:image/png;base64,cGljdHVyZQ=="' in page
    assert "<code>command</code>, seeds" in page
    assert "How many tokens to select?" in page
    text = everything.markdown(tmp_path, ["select_ratio"])
    assert text.startswith("# Experiments\n\n## How many tokens to select?")
    assert "| a |  |\n| b | 1.5 |\n" in text
    assert "\n\n![x](select_ratio/figure.png)\n" in text


def test_controls_are_what_they_say(study):
    methods = study.methods(0)
    steps = methods["CLM"].train.steps
    assert methods["CLM, matched FLOPs"].train.steps == round(steps * (1 + 1 / 3 + 1))
    mixture = methods["CLM on corpus + clean"].data.corpus
    assert mixture.web.weight + mixture.clean.weight == steps * 8
    assert mixture.clean.weight == 2 * 8  # as much as the reference reads
    assert mixture.sums.weight == 0  # evaluated, never trained on
    assert study.targets == ["sums"]
    assert study.corpus == ["web"]
    assert methods["random selection"].select.ratio == methods["SLM"].select.ratio
    assert len({pool.place(study.pool, c) for c in methods.values()}) == len(methods)


def test_the_base_reads_another_order_from_other_weights(study):
    base, policy = study.base(0), study.config(0)
    assert base.seed != policy.seed
    assert not base.model.init


def test_self_reference_reads_no_clean_text(study):
    c = self_reference.of_itself(study.config(0))
    assert set(c.data.clean) == {"web"}
    assert c.data.corpus.clean.weight == c.data.corpus.sums.weight == 0
    assert c.model.init == study.config(0).model.init  # the base is shared


def test_a_weak_reference_is_trained_on_clean_text_only(study):
    c = weak_to_strong.weak_reference(study, 0, {"model.preset": "micro"})
    weights = {name: domain.weight for name, domain in c.data.corpus.items()}
    assert weights == {"web": 0.0, "sums": 0.0, "clean": 1.0}
    assert pool.config_of(pool._needs(pool.place(study.pool, c))[0]).model.preset == "micro"


def test_fine_tuning_needs_answers(study, tmp_path):
    with pytest.raises(InputError, match="no folder sft"):
        finetuning.run(dataclasses.replace(study, data=str(tmp_path)))


def test_overrides_reach_every_run(study):
    changed = dataclasses.replace(study, overrides=("train.steps=3", "select.ratio=0.4"))
    assert changed.config(0).train.steps == changed.methods(0)["random selection"].train.steps == 3
    assert changed.methods(0)["SLM"].select.ratio == 0.4
    assert changed.methods(0)["CLM"].select.ratio == 1.0  # what is compared stays
    for override, said in (("train.step=3", "mean --config.train.steps"), ("seed=a", "seed=a")):
        with pytest.raises(InputError, match=said):
            dataclasses.replace(study, overrides=(override,)).config(0)


def test_general_text_needs_text(study):
    with pytest.raises(InputError, match="--data=DIR"):
        general_pretraining.run(dataclasses.replace(study, scale="mistral", data=""))


@pytest.mark.parametrize("scale", ["tiny", "small", "smollm2", "tinyllama", "mistral"])
def test_every_scale_builds(scale, folder):
    this = Study("example", folder / "scales" / "example", scale)
    for seed in (0, 1):
        for config in this.methods(seed).values():
            assert config.data.corpus
            assert config.reference.steps > 0
            assert pool.place(this.pool, config)


def test_a_method_saves_tokens_or_not(tmp_path):
    def written(name, losses):
        folder = tmp_path / name
        folder.mkdir()
        lines = [f"{100 * i},mine,{loss}" for i, loss in enumerate(losses)]
        (folder / "heldout.csv").write_text("\n".join(["tokens,domain,loss", *lines]))
        return folder

    runs = {("CLM", 0): written("a", [5, 4, 3]), ("SLM", 0): written("b", [5, 3, 2])}
    assert results.speedup(runs, "SLM", "mine").estimate == pytest.approx(2.0)
    assert results.speedup(runs, "CLM", "mine", baseline="SLM").estimate == 0.0
