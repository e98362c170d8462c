"""Rotary position embeddings (RoPE; arXiv 2104.09864, section 3.2) and four kinds of RoPE scaling.

Scaling extends the context beyond that of pretraining: the angles grow more slowly. The formulas
are those of Hugging Face transformers, whose checkpoints they have to reproduce.
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
    """RoPE scaling: how the angles are slowed down.

    kind: "linear", all by `factor`; "dynamic", the base grows with the length once that exceeds
      `original_length` (NTK-aware); "llama3" and "yarn" (arXiv 2309.00071), frequency pairs of
      long wavelength by `factor`, those of short wavelength not, a ramp between.
    original_length: the longest sequence of pretraining, in tokens.
    low, high: where the ramp starts and ends, in rotations of a pair within original_length:
      llama3's low and high frequency factors, yarn's beta_slow and beta_fast.
    attention_factor: cosine and sine are multiplied by it (yarn).
    truncate: yarn's ramp starts and ends at whole pairs.
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
    positions: Integer[Array, "... S"],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    lengths: Integer[Array, "... S"] | None = None,
) -> Float[Array, "2 ... S 1 half"]:
    """Cosine and sine of the angle by which position s rotates pair i: s * theta^(-2i/hd).

    lengths: of the text that each position is in, which dynamic scaling goes by; unless given, the
    largest position of a row, plus one.
    """
    radians = jnp.asarray(frequencies(head_dim, theta, scaling), jnp.float32)
    if scaling is not None and scaling.kind == "dynamic":
        lengths = positions.max(-1, keepdims=True) + 1 if lengths is None else lengths
        ratio = lengths / scaling.original_length
        growth = jnp.maximum(scaling.factor * ratio - (scaling.factor - 1), 1.0)
        powers = -np.arange(0, head_dim, 2) / (head_dim - 2)
        radians *= growth[..., None, None] ** powers
    angles = positions.astype(jnp.float32)[..., None, None] * radians
    waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    return waves if scaling is None else scaling.attention_factor * waves


def rotate(x: Float[Array, "B S H hd"], rotary: Float[Array, "2 ... S 1 half"]) -> Array:
    """Rotate pair i = (x[i], x[i + hd/2]) by its angle: the half-split layout of Hugging Face."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosine and sine by, unless a checkpoint says otherwise."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per token of each frequency pair, float64 [hd/2]; dynamic scaling comes on top."""
    unscaled = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None or scaling.kind == "dynamic":
        return unscaled
    if scaling.kind == "linear":
        return unscaled / scaling.factor
    if scaling.kind == "llama3":
        rotations = scaling.original_length * unscaled / (2 * np.pi)
        kept = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0, 1)
    else:
        # YaRN's ramp is linear in the pair's number, llama3's in its rotations.
        first, last = (_pair_of(n, head_dim, theta, scaling) for n in (scaling.high, scaling.low))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first or 0.001
        kept = 1 - np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)
    return unscaled * (kept + (1 - kept) / scaling.factor)


def _pair_of(rotations: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The (fractional) pair that makes so many rotations within original_length."""
    length = scaling.original_length
    return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
