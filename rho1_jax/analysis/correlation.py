"""Does the loss on some tokens foretell what a model is worth (paper, figures 6 to 8)?

Each point is a checkpoint: its mean loss x on the selected (or unselected) tokens of a fixed text,
and y, its accuracy or loss on a downstream task.

The paper's equation 7 fits y = log(a x + c), and says that a is positive for selected tokens and
negative for unselected ones. By that accuracy would rise with the loss on the selected tokens,
while its figure 7 shows it fall: the signs are printed the wrong way round. So the sign is fitted
here, or may be demanded, to show how much worse the printed one fits.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from rho1_jax.errors import InputError


class Fit(NamedTuple):
    """A curve through points, in the units of y and x: a x + c, or log(a x + c)."""

    a: float
    c: float
    r2: float  # share of the variance of y that it explains


def linear(x: Float[np.ndarray, " C"], y: Float[np.ndarray, " C"]) -> Fit:
    """y = a x + c by least squares; InputError below three checkpoints or where x never moves."""
    x, y = _points(x, y)
    a, c = np.polyfit(x, y, 1)
    return Fit(float(a), float(c), _explained(y, a * x + c))


def logarithmic(
    x: Float[np.ndarray, " C"], y: Float[np.ndarray, " C"], sign: int | None = None
) -> Fit:
    """y = log(a x + c) by least squares; sign: 1 or -1 demands a >= 0 or a <= 0 (equation 7).

    Raises: as `linear`.
    """
    x, y = _points(x, y)
    way = (x - x.min()) / np.ptp(x)

    # Through the curve's height at the left end and its rise to the right end: then a x + c is
    # positive everywhere between, and a has the sign of the rise.
    def curve(p):
        return np.log(np.exp(p[0]) * (1 - way) + np.exp(p[0] + p[1]) * way)

    slope = linear(x, y).a * np.ptp(x)
    rises = (-np.inf if sign != 1 else 0.0, np.inf if sign != -1 else 0.0)
    start = (float(y.mean()), float(np.clip(slope, *rises)))
    bounds = tuple(zip((-np.inf, np.inf), rises, strict=True))
    left, rise = least_squares(lambda p: curve(p) - y, start, bounds=bounds).x
    a = np.exp(left) * np.expm1(rise) / np.ptp(x)
    return Fit(float(a), float(np.exp(left) - a * x.min()), _explained(y, curve((left, rise))))


def correlation(x: Float[np.ndarray, " C"], y: Float[np.ndarray, " C"]) -> float:
    """Pearson's r; InputError as `linear`."""
    x, y = _points(x, y)
    return float(np.corrcoef(x, y)[0, 1])


def _points(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or np.ptp(x) == 0.0:
        raise InputError(
            f"A fit needs at least three checkpoints of different loss, not losses {x.tolist()}: "
            "keep more checkpoints."
        )
    return x, y


def _explained(y: np.ndarray, fitted: np.ndarray) -> float:
    return 1.0 - float(np.sum((y - fitted) ** 2) / np.sum((y - y.mean()) ** 2))
