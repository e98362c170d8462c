"""A config as a command line names it: by its name or its file, with overrides."""

from pathlib import Path

import pytest

from rho1_jax import config_file
from rho1_jax.errors import InputError

ROOT = Path(__file__).parent.parent


def parse(*words):
    return config_file.parse(["command", *words], {"workdir": ""})


def test_configs_are_found_by_name_and_by_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    named = [f"--config={name}" for name in ("math:smollm2", "configs/math.py:smollm2")]
    first, second = (parse(option, "--config.seed=3").config for option in named)
    assert first.to_dict() == second.to_dict()
    assert (first.name, first.seed) == ("math-smollm2", 3)


def test_names_need_no_checkout_around_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--config=sft:chat").named == "sft:chat"
    with pytest.raises(InputError, match="or one of the names domain, general, math, sft"):
        parse("--config=configs/math.py")
    (tmp_path / "math").mkdir()  # a run of that name, say
    assert parse("--config=math").config.name == "math"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(): return {}", "returns a dict"),
        ("get_config = None", "NoneType"),
        ("def get_config(): raise SystemError('why')", "SystemError: why"),
        ("import no_such_module", "No module named"),
        ("", "no function get_config"),
    ],
)
def test_what_is_no_config_is_one_sentence(text, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        parse(f"--config={path}")
    assert "\n" not in str(raised.value)
