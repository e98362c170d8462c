"""The package as strangers install it: a wheel, in an environment of its own, away from here."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("rho1_jax", "configs", "pyproject.toml", "README.md", "LICENSE", "requirements.txt")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")  # building leaves things behind
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    return next((tree / "dist").glob("*.whl"))


def test_the_wheel_has_every_file_and_the_configs_by_their_names(wheel):
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    of_the_package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "rho1_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {f"rho1_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert there == of_the_package | configs


@pytest.mark.nightly
def test_installed_the_command_finds_its_configs(wheel, tmp_path):
    """Packages are those of this environment, of which it is none; nothing is downloaded."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", f"--python={environment / 'bin' / 'python'}", "install"]
    subprocess.run([*pip, "-q", "--no-deps", "--no-index", wheel], check=True)
    few = ("model.preset=micro", "tokenizer.vocab_size=300", "data.seq_len=32")
    done = subprocess.run(
        [environment / "bin" / "rho1", "--config=math", "--dry_run",
         *(f"--config.{change}" for change in few)],
        cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train       300 steps" in done.stdout
    assert (tmp_path / "runs" / "math").is_dir()
