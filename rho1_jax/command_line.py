"""Command lines with a config: --config=FILE[:VARIANT] --config.KEY=VALUE --OPTION=VALUE."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rho1_jax import config as config_lib
from rho1_jax.errors import InputError

_DEFINE: Mapping[type, Callable[..., Any]] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    bool: flags.DEFINE_bool,
}
_PREFIX = "--config."


def parse(argv: Sequence[str], options: Mapping[str, Any]) -> flags.FlagValues:
    """The locked `config` and the `options`, text, whole numbers or yes and no, as attributes.

    argv: the command's name first. options: what may be named, with defaults. InputError says in
    one sentence what is wrong with the command line or the config's file.
    """
    plain, overrides = split(argv)
    config_lib.require_known_keys(_parse(plain, options).config, overrides)
    return _parse(argv, options)


def split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What is no override, and the overrides as KEY=VALUE."""
    plain = [a for a in argv if not a.startswith(_PREFIX)]
    return plain, tuple(a.removeprefix(_PREFIX) for a in argv if a.startswith(_PREFIX))


def overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config itself, with each `a.b=value` in its place; InputError where one does not fit."""
    config_lib.require_known_keys(config, overrides)
    found = flags.FlagValues()
    argv = ["", *(_PREFIX + override for override in overrides)]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=found, lock_config=False, sys_argv=argv
    )
    try:
        found(argv)
    except flags.Error as error:
        raise InputError(f"{str(error).splitlines()[0]}.") from error
    return config


def _parse(argv: Sequence[str], options: Mapping[str, Any]) -> flags.FlagValues:
    found = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=found, sys_argv=list(argv))
    for name, default in options.items():
        _DEFINE[type(default)](name, default, "", flag_values=found)
    sys.modules.pop("config_config", None)  # or a file without get_config would inherit one
    try:
        rest = found(list(argv))[1:]
        config = found.config
        if config is not None:
            config.lock()
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise InputError(_why_not(argv, error)) from error
    if rest:
        raise InputError(f"{rest[0]} is not understood: options look like --name=value.")
    if config is None:
        raise InputError("--config is missing: try --config=configs/math.py.")
    return found


def _why_not(argv: Sequence[str], error: Exception) -> str:
    """One sentence for what went wrong with the flags or in the config file."""
    named = next((a for a in argv if a.startswith("--config=")), "--config")
    if isinstance(error, OSError) or "FileNotFoundError" in str(error):
        return f"{named} cannot be read: give a Python file such as configs/math.py."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not isinstance(error, flags.Error):
        return f"{named} is not a config: {type(error).__name__}: {lines[0]}"
    if "config file" not in lines[0]:
        return f"{lines[0]} (the command's --help says what there is)."
    # The rest is the traceback of the config file, as text; its last line says what was raised.
    kind, _, said = lines[-1].partition(": ")
    return said if kind.endswith("InputError") else f"{named} is not a config: {lines[-1]}"
