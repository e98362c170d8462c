"""The house stands: imports go down, nothing goes in circles, no file outgrows its room."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0, "jsonfile": 0,
    "slm": 1, "models": 1, "data": 1,
    "training": 2, "evaluation": 2, "config": 2, "command_line": 2,
    "analysis": 3, "run": 3, "job": 3, "signals": 3, "stages": 3, "main": 3,
}  # fmt: skip
ON_ONE_FLOOR = {  # the imports allowed between neighbours, all in one direction
    ("stages", "run"), ("stages", "analysis"), ("stages", "job"), ("stages", "signals"),
    ("signals", "run"), ("job", "run"),
    ("evaluation", "training"),
    ("command_line", "config"),
    # aot.py is a command over configs; config.py stands on floor 1 alone
    ("training", "config"), ("training", "command_line"),
    ("jsonfile", "errors"),
    ("main", "run"), ("main", "stages"),
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


def test_the_method_knows_no_files_no_configs_no_sharding():
    for path in (ROOT / "rho1_jax" / "slm").glob("*.py"):
        assert not re.search(
            r"open\(|pathlib|ml_collections|jax\.sharding|\bmesh\b", path.read_text()
        )


def test_no_tensorflow():
    """TensorFlow is never imported, though TFDS is used."""
    code = "import sys, rho1_jax.main; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_file_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in FILES:
        if path.name != "__init__.py":
            assert path.name in readme, f"README.md's tree lacks {path.relative_to(ROOT)}"
