"""The commands that README and docs show: each is read by the command itself, up to where it would
begin to work. Those that are not are listed here, with the reason."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from experiments.lab import study
from rho1_jax import command_line, config_file
from rho1_jax import config as config_lib

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_READ = {  # how they begin, and why they are not
    "pip": "downloads packages",
    "lm_eval": "another project's", "vllm": "another project's",
    "python -c": "asks for devices",
    "python -m venv": "makes an environment",
    "python -m pytest": "runs tests", "python -m tests.chaos": "reads its options at once",
}  # fmt: skip
NOT_THERE = "select.score=relative"  # the score that docs/extending.md adds
PLACES = {"I": "0", "...": "math"}  # what stands for a value that is read


class Read(Exception):
    """A command line was understood."""


def commands_of(page):
    """Commands with their options, in blocks and within lines; no usages, which have brackets."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S)
    found = [line for block in blocks for line in block.splitlines()]
    found += re.findall(r"`((?:python|rho1) [^`]+)`", text)
    found += re.findall(r"^    ((?:python|rho1) .*)$", text, re.M)
    for line in found:
        command = " ".join(re.split(r" #| > | && ", line)[0].split())
        if " " in command.removeprefix("python -m ") and "[--" not in command:
            yield command


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands_of(page)})
READ = [
    pytest.param(command, id=f"{page}: {command}")
    for page, command in COMMANDS
    if not command.startswith(tuple(NOT_READ)) and NOT_THERE not in command
]


def started(argv):
    """Start a module's command as python -m does."""
    module = importlib.import_module(argv[0])
    if hasattr(module, "main"):
        return module.main(argv)
    if argv[0] == "experiments.sweep":
        return module.run(argv)
    return study.main(module.run, argv, None)


@pytest.mark.parametrize("command", READ)
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [re.sub(r"=(I|\.\.\.)$", lambda m: f"={PLACES[m[1]]}", w) for w in shlex.split(command)]
    argv = ["rho1_jax.main", *words[1:]] if words[0] == "rho1" else words[2:]
    of_options, of_config = command_line.parse, config_file.parse

    def read(*args, **kwargs):
        of_options(*args, **kwargs)
        raise Read

    def read_config(*args, **kwargs):
        with monkeypatch.context() as undone:
            undone.setattr(command_line, "parse", of_options)
            config_lib.validate(of_config(*args, **kwargs).config)
        raise Read

    monkeypatch.setattr(command_line, "parse", read)
    monkeypatch.setattr(config_file, "parse", read_config)
    with pytest.raises(Read):
        started(argv)


def test_what_is_not_read_is_there():
    for start in NOT_READ:
        assert any(command.startswith(start) for _, command in COMMANDS), start
    assert len(READ) > 40
