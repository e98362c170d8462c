"""The command line as users meet it: subprocesses, kills, signals, and one sentence per mistake."""

import ast
import collections
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rho1_jax import jsonfile, main
from rho1_jax.training.checkpoint import load_model
from tests import tiny_config
from tests.tiny_config import write_texts

ROOT = Path(__file__).parent.parent
CONFIG = "--config=tests/tiny_config.py"


def command(root, workdir, *more):
    return [
        sys.executable, "-m", "rho1_jax.main", CONFIG, f"--config.data.root={root}",
        f"--workdir={workdir}", *more,
    ]  # fmt: skip


def environment():
    """A plain machine: one CPU device, no checks of shapes."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def start(*args, **kwargs):
    return subprocess.Popen(
        command(*args), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **kwargs,
    )  # fmt: skip


def finish(*args):
    process = start(*args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def params_of(workdir):
    return load_model(workdir)[0]


@pytest.fixture(scope="module")
def straight(texts, tmp_path_factory):
    """A run that nothing disturbed: (folder, what it printed)."""
    workdir = tmp_path_factory.mktemp("straight")
    status, out, err = finish(texts, workdir)
    assert status == 0, err
    return workdir, out


def test_all_stages_leave_what_they_promise(straight):
    workdir, out = straight
    for name in (
        "config.json", "environment.json", "data/noisy/manifest.json", "reference/model.json",
        "scores/noisy/manifest.json", "checkpoints/model.json", "metrics.csv", "heldout.csv",
        "eval.json", "report.html",
    ):  # fmt: skip
        assert (workdir / name).exists(), name
    assert len((workdir / "metrics.csv").read_text().splitlines()) == 1 + 8
    assert re.search(r"train 8/8  loss [\d.]+  selected .* tok/s  matmul \d+%  ETA 0s", out)
    evals = json.loads((workdir / "eval.json").read_text())
    assert evals["policy"].keys() == {"noisy", "clean"}
    assert evals["policy"]["noisy"]["loss"] < evals["initial"]["noisy"]["loss"]


def test_the_reference_is_not_in_the_policys_checkpoint(straight):
    """The saved tree is step, params and opt_state, each once; the place of an average is empty."""
    workdir, _ = straight
    saved = json.loads((workdir / "checkpoints/steps/8/state/_METADATA").read_text())
    names = [ast.literal_eval(key)[0] for key in saved["tree_metadata"]]
    assert set(names) == {"step", "params", "opt_state", "ref_ema", "norms"}
    assert saved["tree_metadata"]["('ref_ema',)"]["value_metadata"]["value_type"] == "None"
    assert names.count("params") == len(jax.tree.leaves(params_of(workdir)))
    moments = [key for key in saved["tree_metadata"] if "'embed'" in key]
    assert len(moments) == 3  # the parameter and its two moments


def test_a_finished_run_is_skipped_and_says_so(texts, straight):
    workdir, _ = straight
    before = (workdir / "metrics.csv").read_bytes()
    status, out, _ = finish(texts, workdir)
    assert status == 0
    assert "reference: finished at step 6, skipped" in out
    assert "score: noisy is finished, skipped" in out
    assert "train: finished at step 8, skipped" in out
    assert "evaluate: finished, skipped" in out
    assert (workdir / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(signum, texts, tmp_path):
    args = (texts, tmp_path / "stopped", "--config.train.steps=100", "--config.select.score=all")
    process = start(*args, start_new_session=True)
    while "train 2/100" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    saved = int(re.search(r"saved at step (\d+) of 100", err).group(1))
    resume = err.splitlines()[-1].strip()
    assert shlex.split(resume) == ["python", *command(*args)[1:]]
    status, out, _ = finish(*args)
    assert status == 0
    assert f"train: resumes at step {saved}\n" in out
    lines = (args[1] / "metrics.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == list(range(1, 101))


def test_live_reference_equals_cached_scores(texts, tmp_path):
    """Float16 scores move a threshold token now and then, not the run."""
    config = tiny_config.get_config()
    config.update_from_flattened_dict({"data.root": str(texts)})
    results = []
    for cached in (True, False):
        folder = tmp_path / str(cached)
        config.score.cached = cached
        main.run(config, folder, ("prepare", "reference", "score", "train"))
        assert (folder / "scores").exists() == cached
        results.append((folder / "heldout.csv").read_text().splitlines()[-1].split(","))
    assert results[0][:3] == results[1][:3] == ["8", "2048", "clean"]
    assert float(results[0][3]) == pytest.approx(float(results[1][3]), rel=1e-3)


def test_a_reference_no_better_than_the_policy_is_warned_about(texts, tmp_path, capsys):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({"data.root": str(texts), "reference.lr": 1.0})
    main.run(config, tmp_path, ("prepare", "reference"))
    assert "WARNING: its held-out loss on clean is" in capsys.readouterr().out


def sentence(capsys, *argv):
    """What a failing command prints: one sentence, no traceback."""
    assert main.main(["main", *argv, "--num_processes=1"]) == 2
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    # Progress aside: a bar rewrites its line, and moves below bars that other tests left open.
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[A-Z]", "", err))
    lines = [line for line in lines if "tok/s]" not in line and line.strip()]
    assert len(lines) == 1, err
    return lines[0]


def tiny(root, workdir, *more):
    return [CONFIG, f"--config.data.root={root}", f"--workdir={workdir}", *more]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=configs/math.py", "--config.selct.ratio=1"], "did you mean --config.select.r"),
        (["--config=configs/math.py", "--stages=trian"], "did you mean train"),
        (["--config=configs/maths.py"], "cannot be read"),
        ([], "--config is missing"),
        (["--config=configs/math.py", "--wrokdir=x"], "wrokdir"),
        (["--config=configs/math.py", "--config.seed=one"], "seed"),
        (["--config=configs/math.py", "--config.select.ratio=0.0"], "select.ratio is 0.0"),
        (["--config=configs/math.py", "--config.select.ratio=1.5"], "select.ratio is 1.5"),
        (["--config=configs/math.py", "--config.mesh.fsdp=3"], "mesh.fsdp=3"),
        (["--config=configs/math.py", "stray"], "stray is not understood"),
        (["--config=configs/math.py:tinylama"], "did you mean tinyllama"),
        (["--config=tests/tiny_config.py:broken"], "is not a config: TypeError"),
        (["--config=README.md"], "is not a config: give a Python file"),
        (["--config=tests/conftest.py"], "get_config"),
        (["--config=configs/math.py", "--config.mesh.data=0"], "mesh"),
        (["--config=configs/math.py", "--config.log_every=0"], "log_every"),
        (["--config=configs/math.py", "--config.score.batch_size=4"], "score.batch_size=4 rows"),
        (["--config=configs/math.py", "--config.model.ref_dtype=bf16"], "did you mean bfloat16"),
        (["--config=configs/math.py", "--stages=report"], "--stages=evaluate first"),
        (["--config=configs/math.py", "--profile=12"], "--profile=12 names no steps"),
        (["--config=mth"], "did you mean math?"),
        (["--config=math:tinylama"], "did you mean tinyllama?"),
    ],
)
def test_a_bad_command_line_is_one_sentence(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert words in sentence(capsys, *argv, f"--workdir={tmp_path}")


def test_help_is_the_docstring(capsys):
    assert main.main(["main", "--help"]) == 0
    assert "--stages=score,train" in capsys.readouterr().out


def test_workdir_that_cannot_be_written(texts, capsys):
    assert "cannot be written" in sentence(capsys, *tiny(texts, "/dev/null/run"))


def test_damaged_config_of_a_run(texts, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"seed": ')
    assert "config.json is damaged" in sentence(capsys, *tiny(texts, tmp_path))


def test_nothing_held_out(tmp_path, capsys):
    root = write_texts(tmp_path / "text")
    more = (
        "--config.data.corpus.noisy.spec=files:few.jsonl",
        "--config.data.corpus.noisy.split_field=",
    )
    (root / "few.jsonl").write_text('{"text": "one two three four five"}\n')
    assert "is held out" in sentence(capsys, *tiny(root, tmp_path / "w", *more))


def test_evaluation_of_another_policy_is_made_anew(texts, straight, tmp_path, capsys):
    w = copied(straight, tmp_path)
    evals = jsonfile.read(w / "eval.json")
    evals["binding"]["policy"] = "of an earlier step"
    jsonfile.write(w / "eval.json", jsonfile.sealed(evals))
    assert main.main(["main", *tiny(texts, w, "--stages=evaluate", "--num_processes=1")]) == 0
    assert "evaluate: policy" in capsys.readouterr().out


def test_missing_file(tmp_path, capsys):
    assert "noisy.jsonl" in sentence(capsys, *tiny(tmp_path, tmp_path / "w"))


def test_corpus_with_no_text(tmp_path, capsys):
    root = write_texts(tmp_path / "text")
    (root / "noisy.jsonl").write_text('{"text": "", "split": "train"}\nnot json\n')
    assert "no usable text" in sentence(capsys, *tiny(root, tmp_path / "w"))


def test_workdir_of_another_config(texts, straight, capsys):
    err = sentence(capsys, *tiny(texts, straight[0], "--config.seed=1"))
    assert "config.seed (0, 1)" in err
    assert "another --workdir" in err


def test_batch_that_does_not_divide_over_the_devices(texts, tmp_path, capsys):
    err = sentence(capsys, *tiny(texts, tmp_path, "--config.reference.batch_size=4"))
    assert "reference.batch_size=4 rows do not divide over 8 devices" in err


def copied(straight, tmp_path):
    """The finished run without its last stages, to break."""
    subprocess.run(["cp", "-r", str(straight[0]), str(tmp_path / "w")], check=True)
    return tmp_path / "w"


def test_corrupt_checkpoint(texts, straight, tmp_path):
    w = copied(straight, tmp_path)
    for path in (w / "checkpoints" / "steps" / "8").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"damaged")
    (w / "eval.json").unlink()  # what was judged before would be skipped, and not read again
    status, _, err = finish(texts, w, "--stages=evaluate")
    assert status == 2, err
    assert "cannot be read" in err
    assert err.strip().count("\n") == 0, err


def test_scores_of_another_corpus(texts, straight, tmp_path, capsys):
    w = copied(straight, tmp_path)
    manifest = w / "scores" / "noisy" / "manifest.json"
    other = jsonfile.read(manifest)
    other["binding"]["rows"] = "of something else"
    jsonfile.write(manifest, jsonfile.sealed(other))
    shutil.rmtree(w / "checkpoints" / "steps" / "8")  # a finished training reads no scores
    assert "belong to other rows" in sentence(capsys, *tiny(texts, w, "--stages=train"))


def test_stage_without_its_predecessor(texts, tmp_path, capsys):
    err = sentence(capsys, *tiny(texts, tmp_path / "w", "--stages=train"))
    assert "prepare" in err


def test_reference_with_another_vocabulary(texts, straight, tmp_path, capsys):
    more = ("--config.tokenizer.vocab_size=280", f"--config.reference.init={straight[0]}")
    err = sentence(capsys, *tiny(texts, tmp_path / "w", *more))
    assert "280" in err
    assert "300" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk(texts, tmp_path, capsys, monkeypatch):
    usage = collections.namedtuple("Usage", "total used free")(2**40, 0, 2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # or the plan would see it coming
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        assert "disk is full" in sentence(capsys, *tiny(texts, disk / "w"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_the_readmes_command(tmp_path):
    """The main command of README.md itself, with fewer steps."""
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"^python -m rho1_jax\.main --config=configs/math\.py.*$", readme, re.M)
    words = shlex.split(found.group())[1:]
    few = ["--config.reference.steps=2", "--config.train.steps=2", "--config.eval.rows=8"]
    subprocess.run(
        [sys.executable, *words, f"--workdir={tmp_path}", *few], cwd=ROOT, env=environment(),
        check=True, timeout=400,
    )  # fmt: skip
    assert json.loads((tmp_path / "eval.json").read_text())["precision"].keys() >= {"excess"}
    assert "<svg" in (tmp_path / "report.html").read_text()
