"""The house stands: imports go down, nothing goes in circles, no file outgrows its room."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rho1_jax.pipeline import STAGES

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0, "files": 0, "jsonfile": 0, "command_line": 0,
    "slm": 1, "models": 1, "data": 1,
    "training": 2,
    "config": 2, "config_schema": 2, "config_values": 2, "config_file": 2,
    "evaluation": 3, "analysis": 3,
    "pipeline": 4,
    "main": 5, "check": 5, "export_scores": 5,
}  # fmt: skip
ON_ONE_FLOOR = {  # the imports allowed between neighbours, all in one direction
    ("config_file", "config"), ("config", "config_schema"), ("config_schema", "config_values"),
    # aot.py is a command over configs; config.py stands on floor 1 alone
    ("training", "config"), ("training", "config_file"),
    ("jsonfile", "errors"), ("command_line", "errors"), ("files", "errors"),
    ("jsonfile", "files"),
}  # fmt: skip
FILES = sorted((ROOT / "rho1_jax").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "rho1_jax").with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rho1_jax"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("rho1_jax") for alias in node.names), path
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    mine = room(path)
    if mine == "__init__":
        return
    for other in imported_rooms(path) - {mine}:
        down = FLOORS[other] < FLOORS[mine] or (mine, other) in ON_ONE_FLOOR
        assert down, f"{path.name} ({mine}) imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_outgrows_its_room(path):
    assert len(path.read_text().splitlines()) <= 350
    assert path.stem not in ("utils", "common", "helpers", "misc")


def test_files_are_written_whole_or_not_at_all():
    """By files.py. The others write to streams and devices, or to a scratch folder of their own."""
    others = {"files.py", "snippet_server.py", "symbolic.py", "hosts.py", "on_beam.py"}
    writes = re.compile(r"""write_(text|bytes)\(|open\(([^()]*, )?["'][wx]b?["']""")
    assert writes.search('path.open("wb")')
    assert writes.search("open(path, 'w')")
    for path in FILES:
        assert path.name in others or not writes.search(path.read_text()), path


def test_the_stages_are_the_listing_of_their_room():
    """One file a stage, `check` beside `run`; beside them only what they share."""
    room = ROOT / "rho1_jax" / "pipeline"
    found = {path.stem for path in room.glob("*.py")}
    assert found - {"__init__", "workspace", "models", "claim", "plan", "baseline"} == set(STAGES)
    for name in STAGES:
        functions = {
            node.name
            for node in ast.parse((room / f"{name}.py").read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert {"check", "run"} <= functions


def test_the_method_knows_no_files_no_configs_no_sharding():
    for path in (ROOT / "rho1_jax" / "slm").glob("*.py"):
        assert not re.search(
            r"open\(|pathlib|ml_collections|jax\.sharding|\bmesh\b", path.read_text()
        )


def test_the_main_job_imports_nothing_dear():
    """TensorFlow never, though TFDS is used; the others where they are needed."""
    dear = {"tensorflow", "torch", "tensorboardX", "matplotlib", "lm_eval", "datasets", "pandas"}
    code = f"import sys, rho1_jax.main; print(*{dear} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode().split() == []


def test_every_file_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in FILES:
        if path.name != "__init__.py":
            assert path.name in readme, f"README.md's tree lacks {path.relative_to(ROOT)}"
