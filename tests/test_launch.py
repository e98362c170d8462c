"""The recipes of experiments/launch/: read by their shells, and run on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import launcher
from tests.tiny_config import write_texts

RECIPES = launcher.ROOT / "experiments" / "launch"
# Runs its command in two tasks as Slurm would, on this machine.
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit
export SLURM_JOB_ID=$((RANDOM % 4096)) SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""


def run(recipe, workdir, path="", *more):
    texts = write_texts(workdir.parent / "texts")
    env = launcher.environment(1)
    env["PATH"] = os.pathsep.join(
        filter(None, [path, str(Path(sys.executable).parent), env["PATH"]])
    )
    return subprocess.run(
        [RECIPES / recipe, *more, "--config=tests/tiny_config.py", f"--config.data.root={texts}",
         f"--workdir={workdir}", "--stages=prepare"],
        cwd=launcher.ROOT, env=env, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


def programs(folder, **scripts):
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return str(folder)


def n_hosts(workdir):
    return json.loads((workdir / "environment.json").read_text())["hosts"]


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda p: p.name)
def test_every_recipe_can_be_read_and_is_explained(path):
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
        assert os.access(path, os.X_OK)
        assert "set -euo pipefail" in path.read_text()
    else:
        pod = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert pod["parallelism"] == pod["completions"]
    assert path.name in (launcher.ROOT / "docs" / "launch.md").read_text()


@pytest.mark.slow
def test_slurms_variables_are_enough(tmp_path):
    """Two tasks find each other through what jax reads of Slurm, and prepare a domain each."""
    done = run("slurm.sh", tmp_path / "run", programs(tmp_path / "bin", srun=SRUN))
    assert done.returncode == 0, done.stderr
    assert n_hosts(tmp_path / "run") == 2
    assert {p.parent.name for p in (tmp_path / "run" / "data").glob("*/manifest.json")} == {
        "noisy", "clean",
    }  # fmt: skip


def test_a_slurm_job_that_saved_goes_back_into_the_queue(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    said = "#!/bin/sh\necho $*\n"
    for status, wanted in ((143, (0, "requeue 7\n")), (2, (2, ""))):
        bin_folder = tmp_path / str(status)
        path = programs(bin_folder, srun=f"#!/bin/sh\nexit {status}\n", scontrol=said)
        done = run("slurm.sh", tmp_path / "run", path)
        assert (done.returncode, done.stdout) == wanted


@pytest.mark.slow
def test_processes_on_one_node(tmp_path):
    done = run("one_node.sh", tmp_path / "run", "", "--processes=2")
    assert done.returncode == 0, done.stderr
    assert n_hosts(tmp_path / "run") == 2
