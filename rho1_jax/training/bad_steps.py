"""Steps that changed nothing (slm/guard.py): named, and in a row too many."""

import logging
from collections.abc import Callable, Mapping

from rho1_jax.errors import InputError

_log = logging.getLogger("rho1_jax")


class TooManyBadSteps(InputError):
    """The training ended; what made its steps bad may change before it goes on."""


class BadSteps:
    """Watches the metrics of one training, name: `reference` or `train`.

    most: bad steps in a row after which it ends. rows_of: step -> its batch's rows, in words.
    """

    def __init__(self, name: str, most: int, rows_of: Callable[[int], str]):
        self._name, self._most, self._rows_of = name, most, rows_of
        self._said_empty = False
        self.in_a_row = 0
        self.advice = (
            f"The last checkpoint stands; lower {name}.lr, look at the rows of the steps that were "
            f"named, or set {name}.most_bad_steps higher, and start again."
        )

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of a step, counted from 1. TooManyBadSteps after `most` in a row."""
        if metrics["empty"] and not self._said_empty:
            self._said_empty = True
            _log.warning(
                "%s: WARNING: step %d kept no token and changed nothing; more are not named.",
                self._name,
                step,
            )
        if not metrics["bad"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        _log.warning(
            "%s: WARNING: step %d changed nothing: its loss or gradient is not finite, or a spike "
            "(gradient norm %g); %s",
            self._name,
            step,
            metrics["grad_norm"],
            self._rows_of(step),
        )
        if self.in_a_row >= self._most:
            raise TooManyBadSteps(
                f"{self._name} stopped at step {step}: {self._most} steps in a row were not finite "
                f"and changed nothing. {self.advice}"
            )
