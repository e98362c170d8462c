"""Damage in every file of a finished run is found by looking, and said in a sentence."""

import shutil

import pytest

from rho1_jax import check, main
from tests import tiny_config
from tests.chaos import damage
from tests.chaos.damage import flip_a_bit


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({"data.root": str(texts), "train.steps": 4})
    folder = tmp_path_factory.mktemp("finished")
    main.run(config, folder)
    return folder


def damaged(folder):
    return {path: problem for path, problem in check.look(folder) if problem}


def test_a_finished_run_is_whole(finished, capsys):
    assert damaged(finished) == {}
    assert check.main(["check", str(finished)]) == 0
    assert "everything is whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    "pattern",
    ["data/*/manifest.json", "data/**/*.array_record*", "data/tokenizer.json", "eval.json",
     "scores/*/ref_loss.npy", "samples.npz", "reference/model.json", "checkpoints/tokenizer.json",
     "metrics.csv", "heldout.csv", "reference/metrics.csv", "report.html", "bound.json",
     "reference/heldout.json", "checkpoints/steps/4/_CHECKPOINT_METADATA"],
)  # fmt: skip
def test_a_flipped_bit_is_found(pattern, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = sorted(run.glob(pattern))[0]
    flip_a_bit(path)
    assert damaged(run), path


def test_a_flipped_bit_in_the_weights_is_found(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    files = [p for p in (run / "checkpoints" / "steps" / "4").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    flip_a_bit(largest)
    found = damaged(run)
    assert [path.name for path in found] == ["4"]
    assert "delete that folder" in next(iter(found.values()))


@pytest.mark.parametrize(
    ("name", "kind", "verdict"),
    [
        ("report.html", "gone", "made again"),
        ("eval.json", "gone", "made again"),
        ("data/noisy/manifest.json", "gone", "made again"),
        ("eval.json", "a bit flipped", "a sentence"),
        ("samples.npz", "truncated", "a sentence"),
        ("metrics.csv", "gone", "a sentence"),
        ("heldout.csv", "a bit flipped", "a sentence"),
        ("reference/model.json", "gone", "made again"),
        ("checkpoints/tokenizer.json", "gone", "made again"),
        ("reference/metrics.csv", "a bit flipped", "found by check"),
    ],
)
def test_the_same_command_uses_no_damage_in_silence(name, kind, verdict, texts, finished, tmp_path):
    command = [
        "--config=tests/tiny_config.py", f"--config.data.root={texts}", "--config.train.steps=4",
        "--num_processes=1",
    ]  # fmt: skip
    (outcome,) = damage.outcomes(
        finished, tmp_path, command, states=["finished"], patterns=[name], damages=[kind]
    )
    assert outcome.verdict == verdict, outcome


def test_what_is_no_run_is_one_sentence(tmp_path, capsys):
    assert check.main(["check", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
