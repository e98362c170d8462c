"""What the value of a config's key may be: kinds of values, each with its range in words.

Floats end up as float32 on the devices, so a range is held by the value as float32, too: b1 =
1 - 1e-9 is 1 there. What underflows there is 0.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ml_collections import ConfigDict

from rho1_jax.data import taggers
from rho1_jax.errors import InputError, require_known, shown
from rho1_jax.slm import outside, scores

LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)
_UNPRINTABLE = r"\x00-\x08\x0b-\x1f\x7f\ud800-\udfff"


@runtime_checkable
class Kind(Protocol):
    """A set of values."""

    @property
    def allowed(self) -> str:
        """What is in it, in words: `it must be ...`."""

    def require(self, key: str, value: Any, default: Any) -> None:
        """InputError for a value of `key` that is not in it."""


@dataclasses.dataclass(frozen=True)
class Number:
    """Whole numbers if `low` is one, else floats; from low to high, without low if `above`, without
    high if `below`; and `also`. of: the unit, in the plural."""

    low: int | float
    high: int | float
    above: bool = False
    below: bool = False
    also: int | float | None = None
    of: str = ""

    @property
    def allowed(self) -> str:
        of = f" of {self.of}" if self.of else ""
        also = "" if self.also is None else f", or {self.also:g}"
        if isinstance(self.low, int):
            return f"a whole number{of} from {self.low:,} to {self.high:,}{also}"
        first = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        last = f" and {'below' if self.below else 'at most'} {self.high:g}"
        return f"a finite number{of} {first}{'' if self.high == LARGEST else last}{also}"

    def require(self, key: str, value: Any, default: Any) -> None:
        if self._holds(value):
            return
        near = default
        if isinstance(value, int | float) and not isinstance(value, bool):
            if value > self.high and not self.below and self.high < LARGEST:
                near = self.high
            if value < self.low and not self.above and self.also is None:
                near = self.low
        raise _wrong(key, value, self, near)

    def _holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(self.low, int):
            return isinstance(value, int) and (value == self.also or self._inside(value))
        if abs(value) > LARGEST:
            return False
        small = float(np.float32(value))
        small = small if abs(small) >= _SMALLEST else 0.0
        return value == self.also or (self._inside(value) and self._inside(small))

    def _inside(self, value: int | float) -> bool:
        starts = value > self.low if self.above else value >= self.low
        return starts and (value < self.high if self.below else value <= self.high)


@dataclasses.dataclass(frozen=True)
class YesNo:
    allowed: str = "True or False"

    def require(self, key: str, value: Any, default: Any) -> None:
        if not isinstance(value, bool):
            raise _wrong(key, value, self, default)


@dataclasses.dataclass(frozen=True)
class Choice:
    names: Collection[str]

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.names)}"

    def require(self, key: str, value: Any, default: Any) -> None:
        if not isinstance(value, str):
            raise _wrong(key, value, self, default)
        require_known(key, value, self.names)


@dataclasses.dataclass(frozen=True)
class Score:
    """One of `names`, or a function elsewhere. That is not imported here but where the config is
    checked as a whole: several hosts must have found each other before any code uses JAX."""

    names: Collection[str]

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.names)}, or package.module:function"

    def require(self, key: str, value: Any, default: Any) -> None:
        if not isinstance(value, str) or (":" in value and not outside.named(value)):
            raise _wrong(key, value, self, default)
        if ":" not in value:
            require_known(key, value, self.names)


@dataclasses.dataclass(frozen=True)
class Text:
    """Text, `what` in words, on one line unless `lines`; the whole of it fits `pattern`."""

    what: str
    empty: bool = False
    lines: bool = False
    pattern: str = r"(?s).*\S.*"

    @property
    def allowed(self) -> str:
        return f'{self.what}, or ""' if self.empty else self.what

    def require(self, key: str, value: Any, default: Any) -> None:
        if isinstance(value, str):
            controls = _UNPRINTABLE + ("" if self.lines else r"\n\t")
            fits = re.fullmatch(self.pattern, value) or (self.empty and not value)
            if fits and not re.search(f"[{controls}]", value):
                return
        raise _wrong(key, value, self, default)


@dataclasses.dataclass(frozen=True)
class Names:
    allowed: str = "names, ('gsm8k', 'math')"

    def require(self, key: str, value: Any, default: Any) -> None:
        del default
        if not isinstance(value, tuple | list):
            raise _wrong(key, value, self)
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.:/+-]+", name) for name in value):
            raise _wrong(key, value, self)


@dataclasses.dataclass(frozen=True)
class Parts:
    allowed: str = "pairs of score and weight, (('reference', 1.0), ('entropy', 1.0))"

    def require(self, key: str, value: Any, default: Any) -> None:
        del default
        if not isinstance(value, tuple | list):
            raise _wrong(key, value, self)
        for part in value:
            if not isinstance(part, tuple | list) or len(part) != 2:
                raise _wrong(key, value, self)
            name, weight = part
            Score(tuple(scores.SCORES)).require(f"{key}: a score", name, "loss")
            Number(-1e6, 1e6).require(f"{key}: the weight of {name}", weight, 1.0)


@dataclasses.dataclass(frozen=True)
class Ratios:
    allowed: str = "pairs of domain and ratio above 0, (('textbooks', 1.0), ('web', 0.4))"

    def require(self, key: str, value: Any, default: Any) -> None:
        del default
        if not isinstance(value, tuple | list):
            raise _wrong(key, value, self)
        for part in value:
            if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[0], str):
                raise _wrong(key, value, self)
            Number(0.0, 1.0, above=True).require(f"{key}: that of {shown(part[0])}", part[1], 1.0)
        if len({part[0] for part in value}) < len(value):
            raise _wrong(key, value, self)


@dataclasses.dataclass(frozen=True)
class Changes:
    allowed: str = "(share of training, domain, weight) each, ((0.8, 'pages', 2.0),)"

    def require(self, key: str, value: Any, default: Any) -> None:
        del default
        if not isinstance(value, tuple | list):
            raise _wrong(key, value, self)
        for change in value:
            if not isinstance(change, tuple | list) or len(change) != 3:
                raise _wrong(key, value, self)
            share, domain, weight = change
            if not isinstance(domain, str):
                raise _wrong(key, value, self)
            Number(0.0, 1.0, above=True, below=True).require(f"{key}: a share", share, 0.8)
            Number(0.0, LARGEST).require(f"{key}: the weight of {domain}", weight, 1.0)


@dataclasses.dataclass(frozen=True)
class Utility:
    allowed: str = 'relevance, tags:TAG[,TAG], or ""'

    def require(self, key: str, value: Any, default: Any) -> None:
        del default
        if not isinstance(value, str):
            raise _wrong(key, value, self, "tags:number,latex")
        if value:
            taggers.parse_utility(value)


@dataclasses.dataclass(frozen=True)
class Sources:
    """The place of domains: a section whose keys are their names."""

    allowed: str = "domains by name, each a config.source(...)"

    def require(self, key: str, value: Any, default: Any) -> None:
        del default
        if not isinstance(value, ConfigDict):
            raise _wrong(key, value, self)


def _wrong(key: str, value: Any, kind: Kind, near: Any = "") -> InputError:
    instance = "" if near in ("", ()) else f", for instance {near}"
    return InputError(f"{key} is {shown(value)}: it must be {kind.allowed}{instance}.")
