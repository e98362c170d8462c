"""A sweep: rows skip what is finished, survive kill -9, and go to a cluster through submitit."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import sweep
from experiments.lab import pool
from rho1_jax.errors import InputError

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
from tests import tiny_config

def get_config():
    c = tiny_config.get_config()
    c.train.steps = {steps}
    c.checkpoint.every = 2
    c.data.root = {root!r}
    c.data.corpus.noisy.spec = "files:corpus/*"
    c.data.clean.clean.spec = "files:clean/*"
    return c

def sweep(name):
    for ratio in (0.3, 0.7):
        yield f"ratio {{ratio}}", {{"select.ratio": ratio}}
"""


@pytest.fixture
def command(folder, tmp_path):
    def of(*more, steps=4):
        (tmp_path / "config.py").write_text(CONFIG.format(root=str(folder / "data"), steps=steps))
        named = f"--config={tmp_path / 'config.py'}"
        return ["sweep", named, "--sweep=ratios", f"--out={tmp_path / 'out'}", *more]

    return of


@pytest.mark.slow
def test_goes_on_after_kill_and_skips_what_is_finished(command, tmp_path, capsys):
    line = [sys.executable, "-m", "experiments.sweep", *command(steps=60)[1:]]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL) as child:
        try:
            checkpoints = wait_for(lambda: saved(tmp_path))
        finally:
            child.kill()  # its processes end by themselves, or the rerun would wait for them
    run = checkpoints[0].parent.parent.parent
    assert not pool.finished(run)
    assert 0 < max(int(path.name) for path in saved(tmp_path)) < 60
    sweep.run(command(steps=60))
    text = capsys.readouterr().out
    assert "resumes at step" in (run / "log.txt").read_text()
    assert text.count("finished") >= 2
    before = {path: path.stat().st_mtime for path in tmp_path.glob("out/runs/*/eval.json")}
    sweep.run(command(steps=60))
    assert before == {path: path.stat().st_mtime for path in before}


def saved(folder):
    """The checkpoints that are whole."""
    found = folder.glob("out/runs/*/checkpoints/steps/*")
    return [path for path in found if path.name.isdigit()]


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"nothing after {seconds} s")


@pytest.mark.slow
def test_jobs_through_submitit(command, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sweep.run(command("--cluster=test"))
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert table.count("finished") == 2
    assert "noisy" in table


def test_slurm_is_asked_with_the_parameters_given(tmp_path, monkeypatch):
    """A stand-in for sbatch keeps the script; its job never runs, so the sweep is interrupted."""
    pytest.importorskip("submitit")
    fake = tmp_path / "bin"
    fake.mkdir()
    submit = 'cp "$1" "$(dirname $0)/script.$$"; echo "Submitted batch job 7"'
    for name, reply in {"sbatch": submit, "squeue": "", "sacct": "", "srun": ""}.items():
        (fake / name).write_text(f"#!/bin/sh\n{reply}\n")
        (fake / name).chmod((fake / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")

    class Enough(Exception):
        pass

    def stop():
        raise Enough

    todo = [tmp_path / "a"]
    ended = sweep.on_cluster(todo, "slurm", tmp_path / "jobs", {"partition": "gpu"}, stop)
    with pytest.raises(Enough):
        list(ended)
    script = next(fake.glob("script.*")).read_text()
    assert "#SBATCH --partition=gpu" in script
    assert "submitit" in script


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "--sweep is missing"),
        (["--sweep=ratios", "--cluster=slrm"], "did you mean slurm"),
        (["--sweep=ratios", "--config.selct.ratio=1"], "did you mean --config.select"),
    ],
)
def test_what_a_command_line_lacks_is_said(command, changes, words):
    with pytest.raises(InputError, match=words):
        sweep.run([*command()[:2], *changes])


def test_a_config_without_a_sweep(tmp_path):
    (tmp_path / "plain.py").write_text("def get_config(): pass\n")
    with pytest.raises(InputError, match="no function sweep"):
        sweep.sweep_of(str(tmp_path / "plain.py"))
