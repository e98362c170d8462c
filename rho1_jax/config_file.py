"""A config as a command line names it: --config=NAME[:VARIANT] --config.KEY=VALUE.

NAME is a Python file with a function get_config, or the name of a config that comes with the
package: math, general, domain, sft.
"""

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rho1_jax import command_line
from rho1_jax import config as config_lib
from rho1_jax.errors import InputError, require_known

_HERE = Path(__file__).parent
_PREFIX = "--config."
_OVERRIDE = re.compile(r"^--?config\.")


def folder() -> Path:
    """Where the configs that come with the package lie: inside it, or beside it in a checkout."""
    inside = _HERE / "configs"
    return inside if inside.exists() else _HERE.parent / "configs"


def parse(
    argv: Sequence[str], options: Mapping[str, Any], required: Mapping[str, str] | None = None
) -> SimpleNamespace:
    """The options (command_line.parse), with the locked config as `config` and what named it as
    `named`. InputError says in one sentence what is wrong with the command line or the file."""
    plain, overrides = split(argv)
    config = {"config": "try --config=configs/math.py"}
    found = command_line.parse(plain, {"config": "", **options}, required=config)
    found.named = found.config
    found.config = overridden(load(found.named), overrides)
    command_line.require_given(found, required or {})
    return found


def split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What is no override, and the overrides as KEY=VALUE."""
    plain = [a for a in argv if not _OVERRIDE.match(a)]
    return plain, tuple(_OVERRIDE.sub("", a) for a in argv if _OVERRIDE.match(a))


def overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config itself, with each `a.b=value` in its place; InputError where one does not fit.

    Each value is checked for itself; whether they fit together says config.validate.
    """
    config_lib.require_known_keys(config, overrides)
    found = flags.FlagValues()
    argv = ["", *(_PREFIX + override for override in overrides)]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=found, lock_config=False, sys_argv=argv
    )
    try:
        found(argv)
    except (flags.Error, ValueError) as error:
        raise InputError(f"{command_line.first_line(error)}.") from error
    config_lib.require_values(config)
    return config


def load(named: str) -> ConfigDict:
    """The locked config that NAME[:VARIANT] means."""
    name, colon, variant = named.partition(":")
    make = module(name).get_config
    try:
        config = make(variant) if colon else make()
    except InputError:
        raise
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise InputError(_no_config(named, error)) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"--config={named} is not a config: get_config returns a "
            f"{type(config).__name__}, not a ConfigDict."
        )
    return config.lock()


def module(name: str) -> ModuleType:
    """The config file of this name as a module, which has a function get_config."""
    path = _path(name)
    spec = importlib.util.spec_from_file_location("named_config", path)
    if spec is None or spec.loader is None:  # no suffix of Python's
        raise InputError(f"--config={name} is not a config: give a Python file.")
    found = importlib.util.module_from_spec(spec)
    sys.modules["named_config"] = found  # where dataclasses look for it
    try:
        spec.loader.exec_module(found)
    except OSError as error:
        raise InputError(
            f"--config={name} cannot be read: give a Python file such as configs/math.py, or one "
            f"of the names {', '.join(_names())}."
        ) from error
    except Exception as error:
        raise InputError(_no_config(name, error)) from error
    if not hasattr(found, "get_config"):
        raise InputError(f"--config={name} is not a config: it has no function get_config.")
    return found


def _path(name: str) -> Path:
    path = Path(name)
    if path.suffix or path.name != name or path.is_file():
        return path
    require_known("--config", name, _names())
    return folder() / f"{name}.py"


def _names() -> list[str]:
    return sorted(path.stem for path in folder().glob("[a-z]*.py"))


def _no_config(named: str, error: Exception) -> str:
    said = command_line.first_line(error)
    return f"--config={command_line.cut(named)} is not a config: {type(error).__name__}: {said}"
