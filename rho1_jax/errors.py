"""The one exception users are meant to see."""

import difflib
from collections.abc import Iterable
from typing import Any

_LONGEST = 80  # characters of a bad value that a sentence repeats


class InputError(ValueError):
    """Bad input, said in one sentence: what was wrong, where, and what to do about it."""


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """InputError that names the nearest of `known`, unless `name` is one of them."""
    known = tuple(known)
    if name in known:
        return
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(known)}."
    raise InputError(f"{what} {shown(name)} is not known: {hint}")


def shown(value: Any) -> str:
    """A bad value as a sentence repeats it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
