"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2), and four ways to stretch them.

A stretched model reads more tokens than it was pretrained on, because its angles grow slower. The
formulas are those of Hugging Face transformers, whose checkpoints they have to reproduce.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from rho1_jax.errors import InputError, require_known

KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How angles are slowed down.

    kind: "linear", all by `factor`; "dynamic", the base grows with the length once that exceeds
      `original_length` (NTK-aware); "llama3" and "yarn" (arXiv 2309.00071), slow planes by
      `factor`, fast ones not, a ramp between.
    original_length: the longest sequence of pretraining, in tokens.
    low, high: where the ramp starts and ends, in turns that a plane makes within original_length:
      llama3's low and high frequency factors, yarn's beta_slow and beta_fast.
    attention_factor: cosine and sine are multiplied by it (yarn).
    truncate: yarn's ramp starts and ends at whole planes.
    """

    kind: str
    factor: float
    original_length: int
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        require_known("rope scaling", self.kind, KINDS)
        if self.factor < 1 or self.original_length < 1 or not 0 < self.low < self.high:
            raise InputError(
                f"rope scaling {self} makes no sense: factor and original_length are at least 1, "
                "and low is above 0 and below high."
            )


def table(
    positions: Integer[Array, "... S"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[Array, "2 ... S 1 half"]:
    """Cosine and sine of the angle by which position s turns plane i: s * theta^(-2i/hd).

    The length that dynamic scaling goes by is the largest position of a row, plus one.
    """
    turns = jnp.asarray(frequencies(head_dim, theta, scaling), jnp.float32)
    if scaling is not None and scaling.kind == "dynamic":
        ratio = (positions.max(-1, keepdims=True) + 1) / scaling.original_length
        growth = jnp.maximum(scaling.factor * ratio - (scaling.factor - 1), 1.0)
        turns *= growth ** (-np.arange(0, head_dim, 2) / (head_dim - 2))
        turns = turns[..., None, None, :]
    angles = positions.astype(jnp.float32)[..., None, None] * turns
    waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    return waves if scaling is None else scaling.attention_factor * waves


def rotate(x: Float[Array, "B S H hd"], rotary: Float[Array, "2 ... S 1 half"]) -> Array:
    """Turn plane i = (x[i], x[i + hd/2]) by its angle: the half-split layout of Hugging Face."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosine and sine by, unless a checkpoint says otherwise."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per token of each plane, float64 [hd/2]; dynamic scaling comes on top."""
    unscaled = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None or scaling.kind == "dynamic":
        return unscaled
    if scaling.kind == "linear":
        return unscaled / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_length * unscaled / (2 * np.pi)
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    else:
        # YaRN's ramp is linear in the plane's number, llama3's in its turns.
        first, last = (_plane_of(n, head_dim, theta, scaling) for n in (scaling.high, scaling.low))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first or 0.001
        kept = 1 - np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)
    return unscaled * (kept + (1 - kept) / scaling.factor)


def _plane_of(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The (fractional) plane that makes so many turns within original_length."""
    length = scaling.original_length
    return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
