"""What README and docs say is there: links, commands, keys, functions, the tree."""

import ast
import importlib.util
import re
import tomllib
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
SECTIONS = "model|tokenizer|data|reference|score|select|train|eval|checkpoint|mesh"


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@each_page
def test_commands_name_modules_and_configs_that_exist(page):
    text = page.read_text()
    for name in re.findall(r"python -m ([\w.]+\w)", text):
        top, *rest = name.split(".")
        if top in ("rho1_jax", "experiments"):
            path = ROOT.joinpath(top, *rest)
            assert path.with_suffix(".py").exists(), f"{page.name}: python -m {name}"
        else:
            assert importlib.util.find_spec(top), f"{page.name}: python -m {name}"
    for config in re.findall(r"\bconfigs/\w+\.py", text):
        assert (ROOT / config).exists(), f"{page.name}: {config}"


@each_page
def test_commands_have_options_that_exist(page):
    """As text: each option stands, in quotes or in the usage, where the command is made."""
    whole = page.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"python -m ((?:rho1_jax|experiments)[\w.]*\w)([^`\n#]*)", whole):
        files = [ROOT.joinpath(*name.split(".")).with_suffix(".py")]
        if name.startswith("experiments"):
            files += (ROOT / "experiments").rglob("*.py")
        code = "".join(file.read_text() for file in files if file.exists())
        for option in set(re.findall(r"--(\w+)", rest)) - {"config"}:
            assert re.search(rf"\"(--)?{option}\b|--{option}\b", code), f"{name}: --{option}"


@each_page
def test_keys_are_those_of_the_config(page):
    known = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/config.md").read_text(), re.M))
    told = re.sub(r"^Changed names$.*?^$", "", page.read_text(), flags=re.M | re.S)
    for key in re.findall(rf"(?:`|--config\.)((?:{SECTIONS})\.[a-z]\w*)(?!\.?\w)(?!\()", told):
        if not key.endswith((".py", ".json", ".csv", ".npz")):
            assert key in known | {"data.corpus", "data.clean"}, f"{page.name}: {key}"


@each_page
def test_functions_are_where_they_are_said_to_be(page):
    for file, name in re.findall(r"`(?!configs/)([\w/]+\.py):(\w+)`", page.read_text()):
        tree = ast.parse((ROOT / "rho1_jax" / file).read_text())
        assert name in {getattr(node, "name", "") for node in tree.body}, f"{page.name}: {file}"


def test_the_readme_is_a_first_screen_and_its_tree_is_true():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    tree = readme.split("## The house")[1].split("\n\n")[1]
    there = {path.name for path in ROOT.rglob("*.py")}
    for name in re.findall(r"[\w]+\.py", tree):
        assert name in there, f"README.md's tree has {name}, which is not there"


def test_the_dev_extra_is_requirements_dev():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {str(Requirement(line)) for line in extras["optional-dependencies"]["dev"]}
    lines = (re.sub(r"(^|\s)#.*", "", x) for x in (ROOT / "requirements-dev.txt").open())
    listed = {str(Requirement(x)) for x in map(str.strip, lines) if x and not x.startswith("-r")}
    assert extra == listed


def test_the_score_of_the_walk_passes_its_own_test():
    """docs/extending.md: the function and the test that it shows, run as they stand there."""
    function, test = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S
    )
    names = {"Float": Float, "Array": Array, "jnp": jnp, "np": np}
    exec(function.split("SCORES =")[0], names)
    names["scores"] = types.SimpleNamespace(relative=names["relative"])
    exec(test, names)
    names["test_relative"]()
