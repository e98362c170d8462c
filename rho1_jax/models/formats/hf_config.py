"""Hugging Face's config.json to and from Architecture.

Every key is understood, known not to matter, or refused by name: a model is never read as something
it is not.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rho1_jax.errors import InputError, require_known
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.rotary import RopeScaling, yarn_attention_factor

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# rope_scaling's keys, by type: required, then optional.
_SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"),
               ("original_max_position_embeddings",)),
    "yarn": (("factor",), ("original_max_position_embeddings", "beta_slow", "beta_fast", "mscale",
                           "mscale_all_dim", "attention_factor", "truncate")),
}  # fmt: skip
# What transformers takes where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128, "sliding_window": 4096},
    "smollm3": {"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
}
# Keys that decide how a model is trained, sampled or stored, not what it computes.
_INERT = frozenset(
    (
        "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
        "initializer_range", "is_llama_config", "max_sequence_length", "_name_or_path",
        "model_type", "pad_token_id", "pretraining_tp", "torch_dtype", "transformers_version",
        "unk_token_id", "use_cache",
    )
)  # fmt: skip


def read(described: Mapping[str, Any], where: Path | str) -> Architecture:
    """The shape that a config.json describes; InputError names the key that is not understood."""
    kind = described.get("model_type")
    if kind not in _DEFAULTS:
        raise InputError(
            f"{where} describes a model_type {kind!r}: only {', '.join(_DEFAULTS)} can be read."
        )
    left = {k: v for k, v in described.items() if k not in _INERT and v is not None}
    defaults = {"rope_theta": 10_000.0, "tie_word_embeddings": False} | _DEFAULTS[kind]

    def take(key: str, *default: Any, of: type | tuple[type, ...] = int) -> Any:
        value = left.pop(key, None)
        if value is None:
            # An explicit null is no window; a missing key is the default.
            value = None if key in described else defaults.get(key)
            value = next(iter(default), None) if value is None else value
        elif not isinstance(value, of) or (of is int and isinstance(value, bool)):
            raise InputError(f"{where}: {key} is {value!r}, which is not understood.")
        if value is None and not default:
            raise InputError(f"{where} has no {key!r}: the file is incomplete.")
        return value

    n_layers, n_heads, width = (
        take(f"{name}") for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    max_length = take("max_position_embeddings", 2048)
    theta, scaling = _rope(left, take("rope_theta", of=(int, float)), max_length, where)
    config = Architecture(
        vocab_size=take("vocab_size"),
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=take("num_key_value_heads", n_heads),
        head_dim=take("head_dim", width // n_heads),
        ffn_width=take("intermediate_size"),
        max_length=max_length,
        rope_theta=theta,
        rope_scaling=scaling,
        nope_layers=_nope_layers(take, n_layers) if kind == "smollm3" else (),
        norm_eps=float(take("rms_norm_eps", 1e-6, of=(int, float))),
        tied_head=take("tie_word_embeddings", of=bool),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        window=_window(kind, take, n_layers, where),
    )
    if take("hidden_act", "silu", of=str) != "silu":
        raise InputError(f"{where}: hidden_act={described['hidden_act']!r}, only 'silu' is known.")
    for key, value in left.items():
        if value is not False:
            raise InputError(
                f"{where}: {key}={json.dumps(value)[:60]} is not supported (remove the key if the "
                "model computes the same without it)."
            )
    return config


def describe(config: Architecture) -> dict[str, Any]:
    """The config.json of this shape; InputError if no architecture of transformers has it."""
    c = config
    special = {
        "qwen2": c.qkv_bias, "qwen3": c.qk_norm, "smollm3": bool(c.nope_layers),
        "mistral": c.window is not None,
    }  # fmt: skip
    kinds = [kind for kind, has in special.items() if has] or ["llama"]
    if kinds[0] in ("qwen2", "qwen3") and c.window is not None:
        kinds.remove("mistral")
    if len(kinds) > 1:
        raise InputError(
            f"No architecture of transformers is {' and '.join(kinds)} at once: "
            "this model cannot be exported."
        )
    kind = kinds[0]
    described = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_width,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rope_scaling": _described_scaling(c.rope_scaling),
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_head,
    }
    if kind == "mistral":
        described["sliding_window"] = c.window
    if kind in ("qwen2", "qwen3"):
        described["use_sliding_window"] = c.window is not None
        described |= {"sliding_window": c.window, "max_window_layers": 0} if c.window else {}
    if kind == "smollm3":
        described["no_rope_layers"] = [int(i not in c.nope_layers) for i in range(c.n_layers)]
    return described


def _rope(
    left: dict[str, Any], theta: float, max_length: int, where: Path | str
) -> tuple[float, RopeScaling | None]:
    """The base and its scaling, from rope_scaling or (since transformers 5) rope_parameters."""
    given = left.pop("rope_parameters", {}) | left.pop("rope_scaling", {})
    given = {k: v for k, v in given.items() if v is not None}
    theta = float(given.pop("rope_theta", theta))
    kind = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    require_known(f"{where}: rope_scaling type", kind, _SCALING_KEYS)
    required, optional = _SCALING_KEYS[kind]
    for key in given.keys() - {*required, *optional}:
        raise InputError(f"{where}: rope_scaling.{key} is not supported for {kind!r} scaling.")
    for key in set(required) - given.keys():
        raise InputError(f"{where}: rope_scaling of type {kind!r} lacks {key!r}.")
    if kind == "default":
        return theta, None
    common = {
        "kind": kind,
        "factor": float(given["factor"]),
        "original_length": given.get("original_max_position_embeddings", max_length),
    }
    if kind == "llama3":
        common |= {"low": float(given["low_freq_factor"]), "high": float(given["high_freq_factor"])}
    if kind == "yarn":
        common |= {
            "low": float(given.get("beta_slow", 1)),
            "high": float(given.get("beta_fast", 32)),
        }
        common |= {"truncate": given.get("truncate", True), "attention_factor": _yarn(given)}
    return theta, RopeScaling(**common)


def _yarn(given: Mapping[str, Any]) -> float:
    if "attention_factor" in given:
        return float(given["attention_factor"])
    factor, part, whole = given["factor"], given.get("mscale"), given.get("mscale_all_dim")
    if part and whole:
        return yarn_attention_factor(factor, part) / yarn_attention_factor(factor, whole)
    return yarn_attention_factor(factor)


def _described_scaling(s: RopeScaling | None) -> dict[str, Any] | None:
    if s is None:
        return None
    described: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn"):
        described["original_max_position_embeddings"] = s.original_length
    if s.kind == "llama3":
        described |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
    if s.kind == "yarn":
        described |= {"beta_slow": s.low, "beta_fast": s.high, "truncate": s.truncate}
        described["attention_factor"] = s.attention_factor
    return described


def _nope_layers(take: Callable, n_layers: int) -> tuple[int, ...]:
    every = take("no_rope_layer_interval", 4)
    rotated = take("no_rope_layers", [(i + 1) % every for i in range(n_layers)], of=list)
    return tuple(i for i in range(n_layers) if not rotated[i])


def _window(kind: str, take: Callable, n_layers: int, where: Path | str) -> int | None:
    """The sliding window, if all layers have it; InputError if only some do."""
    if kind == "llama":
        return None
    window = take("sliding_window", None)
    if kind == "mistral":
        return window
    first = take("max_window_layers", 28)
    sliding = take("use_sliding_window", False, of=bool) and window is not None
    of_layer = ["sliding_attention" if sliding and i >= first else "full_attention"
                for i in range(n_layers)]  # fmt: skip
    types = set(take("layer_types", of_layer, of=list))
    if types == {"full_attention"}:
        return None
    if types == {"sliding_attention"} and window is not None and kind != "smollm3":
        return window
    raise InputError(
        f"{where}: sliding_window applies to some layers and not to others (layer_types, "
        "max_window_layers), which is not supported."
    )
