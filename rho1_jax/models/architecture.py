"""What a decoder is, and how it is computed: only the first is saved with a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rho1_jax.errors import InputError
from rho1_jax.models.rotary import RopeScaling

REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and settings that a model's parameters belong to; hashable."""

    vocab_size: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_width: int
    max_length: int = 2048  # tokens of the longest sequence it was made for; not enforced
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    nope_layers: tuple[int, ...] = ()  # layers whose q and k are not rotated (SmolLM3)
    norm_eps: float = 1e-5
    tied_head: bool = True
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    window: int | None = None  # tokens a position sees, itself included; None: all before it

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads={self.n_heads} is no multiple of n_kv_heads={self.n_kv_heads}: "
                "every key-value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim} is odd: rotary positions need pairs.")
        if self.window is not None and self.window < 1:
            raise InputError(f"window={self.window} must be at least 1 token, or None.")
        if not all(0 <= i < self.n_layers for i in self.nope_layers):
            raise InputError(
                f"nope_layers={self.nope_layers} are not among 0..{self.n_layers - 1}."
            )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Architecture":
        """What `to_json` gave. How older versions computed, which they saved too, is left out."""
        fields = {k: v for k, v in stored.items() if k not in _names(Compute)}
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        fields["nope_layers"] = tuple(fields.get("nope_layers", ()))
        return Architecture(**fields)

    def to_json(self) -> dict[str, Any]:
        """The architecture alone, as JSON has it."""
        return dataclasses.asdict(Architecture(**self._sizes()))

    def computed(self, **how: Any) -> "LlamaConfig":
        """This architecture, computed as the fields of Compute in `how` say; else the defaults."""
        return LlamaConfig(**self._sizes(), **how)

    def _sizes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _names(Architecture)}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward and a backward pass are computed: up to rounding, the same numbers, but for
    `separator`, which says what a packed row is.
    """

    dtype: str = "float32"  # of the computation; parameters are float32 unless the caller casts
    remat: str = "none"  # "none" | "dots" (keep matrix products) | "full" (keep block inputs)
    scan_layers: bool = True  # False: the same stacked parameters, the loop unrolled
    batch_axes: tuple[str, ...] | None = None  # mesh axes tokens are split over: placement.py
    separator: int | None = None  # the token between documents that `llama.apply` keeps apart

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} must be float32 or bfloat16.")
        if self.remat not in REMAT:
            raise InputError(f"remat={self.remat!r} must be none, dots or full.")


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Compute, Architecture):
    """Both, as `llama.apply` takes them: hashable, so it can be a static argument."""

    def __post_init__(self):
        Architecture.__post_init__(self)
        Compute.__post_init__(self)


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
