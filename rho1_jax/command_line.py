"""The command lines of all commands: --NAME=VALUE; what is wrong is one sentence on stderr and the
exit status 2; --help is the docstring of the command's module.

A command says its options as plain data, name -> what it may be: a default, whose type every value
must have; a type, for what may be left out and then is None; a tuple of words, the first of them
unless another is named; a list, for words that may be given one at a time. `argv` has the command's
name first, as sys.argv has.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

from rho1_jax.errors import InputError, require_known

Command = Callable[[Sequence[str]], int | None]

_DEFINE: Mapping[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    float: flags.DEFINE_float,
    int: flags.DEFINE_integer,
    list: flags.DEFINE_multi_string,
}  # others are text
_LONGEST = 300  # characters of a bad word that a sentence repeats


def run(
    command: Callable[[Sequence[str]], int | None], argv: Sequence[str], doc: str | None
) -> int:
    """What `command` returns, else 0; 2 and one sentence for an InputError. --help prints `doc`."""
    if {"--help", "-h"} & set(argv[1:]):
        print(doc)
        return 0
    try:
        return command(argv) or 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def parse(
    argv: Sequence[str],
    options: Mapping[str, Any],
    *,
    required: Mapping[str, str] | None = None,
    words: Sequence[str] = (),
) -> SimpleNamespace:
    """The options as attributes, and as `words` what belongs to none.

    required: options that must be given, each with what to do where it is not.
    words: what has to be there beside the options, by its names in the help; of what ends with
      "..." there may be more.
    InputError says in one sentence what is wrong with the command line.
    """
    found = flags.FlagValues()
    found.set_gnu_getopt()
    for name, default in options.items():
        kind = default if isinstance(default, type) else type(default)
        given = default if kind in (bool, float, int, list) and kind is not default else None
        _DEFINE.get(kind, flags.DEFINE_string)(name, given, "", flag_values=found)
    try:
        rest = found(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        require_known("The option", f"--{error.flagname}", [f"--{name}" for name in options])
        raise InputError(f"{first_line(error)}.") from error
    except flags.Error as error:
        raise InputError(f"{first_line(error)} (--help says what there is).") from error
    if len(rest) > len(words) and not (words and words[-1].endswith("...")):
        extra = cut(rest[len(words)])
        raise InputError(f"{extra} is not understood: options look like --name=value.")
    if len(rest) < len(words):
        raise InputError(f"{words[len(rest)]} is missing: --help says what it is.")
    values = {name: _value(name, found[name].value, what) for name, what in options.items()}
    parsed = SimpleNamespace(words=rest, **values)
    require_given(parsed, required or {})
    return parsed


def require_given(parsed: SimpleNamespace, required: Mapping[str, str]) -> None:
    """InputError for an option that is not there, with what to do."""
    for name, hint in required.items():
        if getattr(parsed, name) in (None, ""):
            raise InputError(f"--{name} is missing: {hint}.")


def first_line(error: Exception) -> str:
    return cut(next(iter(str(error).strip().splitlines()), type(error).__name__))


def cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _value(name: str, given: Any, what: Any) -> Any:
    """What an option is, `given` being what the command line says, None where it says nothing."""
    if isinstance(what, tuple):
        if given is not None:
            require_known(f"--{name}", given, what)
        return what[0] if given is None else given
    if given is None:
        return None if isinstance(what, type) else what
    kind = what if isinstance(what, type) else type(what)
    return Path(given) if issubclass(kind, Path) else given
