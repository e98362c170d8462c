"""A score from outside the project, named `package.module:function`: found by import, and checked.

Everything that can be wrong with one is said in one sentence before a run begins: no such module or
function, an argument that is no signal, a result that is not one number a token.
"""

import functools
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rho1_jax.errors import InputError, require_known, shown
from rho1_jax.slm.signals import SIGNALS, TOP

FORM = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
ARGUMENTS = (*(name for name in SIGNALS if name not in TOP), "valid", "targets")
_DTYPES = {"valid": jnp.bool_, "targets": jnp.int32}
_SHAPE = 2, 4  # rows and targets that a score is tried on


def named(name: str) -> bool:
    """Whether a score's name is one of a function elsewhere."""
    return re.fullmatch(FORM, name) is not None


@functools.cache
def load(name: str) -> Callable[..., Array]:
    """The function `package.module:function`; InputError if it is no score."""
    module, (_, _, attribute) = _module(name), name.partition(":")
    what = f"The score {shown(name)}: its module has no"
    there = [key for key, value in vars(module).items() if callable(value)]
    if not hasattr(module, attribute):
        require_known(f"{what} function", attribute, there)
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(
            f"The score {shown(name)} is no function but a {type(function).__name__}: name one "
            f"whose arguments are among {', '.join(ARGUMENTS)}."
        )
    _require_signature(name, function)
    _require_result(name, function)
    return function


def source_digest(name: str) -> str:
    """Hex sha256 of the source that `name` lies in: of its whole module, so that what the function
    calls there counts."""
    function = load(name)
    here = _module(name)
    modules = {here, sys.modules.get(getattr(function, "__module__", ""), here)}
    try:
        sources = sorted(inspect.getsource(module) for module in modules)
    except (OSError, TypeError) as error:
        raise InputError(
            f"The score {shown(name)} has no source to bind a run to: name a function that is "
            "written in Python."
        ) from error
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def _module(name: str) -> ModuleType:
    module = name.partition(":")[0]
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module is a program: anything can go wrong in it
        raise InputError(
            f"The score {shown(name)}: its module cannot be imported ({_said(error)}); install it, "
            "or start from the folder that it lies in."
        ) from error


def _require_signature(name: str, function: Callable[..., Array]) -> None:
    """InputError unless every argument is a signal, which can be given by name."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The score {shown(name)} does not say what its arguments are: write a function in "
            f"Python whose arguments are among {', '.join(ARGUMENTS)}."
        ) from error
    if not arguments:
        raise InputError(
            f"The score {shown(name)} takes no argument: name what it reads, among "
            f"{', '.join(ARGUMENTS)}."
        )
    for a in arguments:
        if a.kind not in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY):
            raise InputError(
                f"The score {shown(name)} has the argument {a}, which no signal can be given to: "
                f"name each that it reads, among {', '.join(ARGUMENTS)}."
            )
        require_known(f"The score {shown(name)}: its argument", a.name, ARGUMENTS)


def _require_result(name: str, function: Callable[..., Array]) -> None:
    """InputError unless the function makes one number a token of its signals."""
    signals = {
        argument: jax.ShapeDtypeStruct(_SHAPE, _DTYPES.get(argument, jnp.float32))
        for argument in inspect.signature(function).parameters
    }
    try:
        found = jax.eval_shape(lambda signals: function(**signals), signals)
    except Exception as error:
        raise InputError(
            f"The score {shown(name)} fails on signals [b, S] ({_said(error)}): it must be made of "
            "JAX operations that know no values."
        ) from error
    one = isinstance(found, jax.ShapeDtypeStruct)
    if not one or found.shape != _SHAPE or not jnp.issubdtype(found.dtype, jnp.floating):
        what = f"{found.dtype} {list(found.shape)}" if one else f"a {type(found).__name__}"
        raise InputError(
            f"The score {shown(name)} makes {what} of signals {list(_SHAPE)}: it must return one "
            "floating point number for each token."
        )


def _said(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:150]}" if first else type(error).__name__
