"""GGUF files: weights and shape in the form that models/llama.py describes.

GGUF stores a matrix as [out, in] where ours are [in, out], and each layer under its own name. For
Llama and SmolLM3 it also reorders the rows of q and k within each head, because llama.cpp rotates
neighbours (x[2i], x[2i+1]) where rotary.py rotates halves (x[i], x[i + hd/2]).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rho1_jax.errors import InputError
from rho1_jax.models import rotary
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import weights
from rho1_jax.models.llama import Params
from rho1_jax.models.rotary import RopeScaling, yarn_attention_factor

_REQUIRED = object()
# Architecture -> whether its rows are reordered. Mistral, TinyLlama and SmolLM2 are "llama".
_REORDERED = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False}
_NOPE_EVERY = 4  # SmolLM3: every fourth layer; llama.cpp has it in its code, not in the file
_STORED = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_LLAMA3_FACTORS, _LLAMA3_LENGTH = "rope_freqs.weight", 8192
# Metadata that does not change what a model computes.
_INERT = ("rope.scaling.finetuned", "tensor_data_layout")


def load(
    path: str | Path, place: weights.Place = weights.on_first_device
) -> tuple[Params, Architecture]:
    """Parameters (float32, placed by `place`) and shape of a GGUF file.

    Quantised tensors become float32; layers are stacked, q and k put into half-split order. Raises
    InputError for a damaged, incomplete or unsupported file, saying what is wrong.
    """
    config, tensors, reordered = _described(path)
    shapes = {_stored_name(n, i): shape for n, i, shape in weights.stored_shapes(config)}

    def find(name: str, layer: int | None) -> Callable[[Any], np.ndarray]:
        stored_name = _stored_name(name, layer)
        stored = _dequantized(tensors[stored_name], shapes[stored_name], path)
        if reordered and name in ("q", "k", "q_bias", "k_bias"):
            stored = _pairs_to_halves(stored, config.head_dim)
        ours = stored if layer is None else stored.T
        return lambda index: ours[index]

    return weights.assemble(config, find, place), config


def architecture(path: str | Path) -> Architecture:
    """The shape of a GGUF file; InputError as in `load`, for what shows without the weights."""
    return _described(path)[0]


def _described(path: str | Path) -> tuple[Architecture, dict[str, Any], bool]:
    """Shape, tensors by name, none of them read, and whether rows of q and k are reordered."""
    reader = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = metadata(reader, path, "general.architecture")
    config = _config(reader, tensors, kind, path)
    shapes = {_stored_name(n, i): shape for n, i, shape in weights.stored_shapes(config)}
    for name in shapes.keys() - tensors.keys():
        raise InputError(f"{path} has no tensor {name!r}: the file is incomplete.")
    for name in tensors.keys() - shapes.keys() - {_LLAMA3_FACTORS}:
        raise InputError(
            f"{path}: tensor {name!r} has no place in a model of the architecture "
            f"{kind!r}, and without it the model would be another one."
        )
    return config, tensors, _REORDERED[kind]


def _stored_name(name: str, layer: int | None) -> str:
    return _STORED[name] if layer is None else f"blk.{layer}.{_STORED[name]}"


def _pairs_to_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows 0, 2, 4, .. of each head first, then 1, 3, 5, ..: [heads*hd, ..]."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantized(tensor: Any, shape: tuple[int, ...], path: str | Path) -> np.ndarray:
    stored = tuple(int(n) for n in reversed(tensor.shape))
    if stored != shape:
        raise InputError(
            f"{path}: tensor {tensor.name!r} is {stored} where its metadata asks for {shape}."
        )
    try:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise InputError(f"{path}: tensor {tensor.name!r} cannot be read: {error}.") from error
    return np.array(array, np.float32)  # a copy: a view would keep the file mapped


def _config(
    reader: gguf.GGUFReader, tensors: dict[str, Any], architecture: str, path: str | Path
) -> Architecture:
    if architecture not in _REORDERED:
        raise InputError(
            f"{path} holds a model of the architecture {architecture!r}: only "
            f"{', '.join(_REORDERED)} can be read (Mistral and SmolLM2 are stored as llama)."
        )
    known = set(_INERT)

    def get(key: str, default: Any = _REQUIRED) -> Any:
        known.add(key)
        return metadata(reader, path, f"{architecture}.{key}", default)

    width, n_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise InputError(
                f"{path}: {architecture}.{key} is {get(key)} where heads are {head_dim} wide, "
                "which llama.py cannot compute."
            )
    n_layers, max_length = get("block_count"), get("context_length", 2048)
    config = Architecture(
        vocab_size=get("vocab_size", len(metadata(reader, path, "tokenizer.ggml.tokens", []))),
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_width=get("feed_forward_length"),
        max_length=max_length,
        rope_theta=_decimal(get("rope.freq_base", 10_000.0)),
        rope_scaling=_scaling(get, tensors.get(_LLAMA3_FACTORS), max_length, path),
        nope_layers=tuple(range(_NOPE_EVERY - 1, n_layers, _NOPE_EVERY))
        if architecture == "smollm3"
        else (),
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        tied_head=_STORED["head"] not in tensors,
        qkv_bias=_stored_name("q_bias", 0) in tensors,
        qk_norm=_stored_name("q_norm", 0) in tensors,
        window=get("attention.sliding_window", None),
    )
    for key, field in reader.fields.items():
        prefix, _, rest = key.partition(".")
        if prefix == architecture and rest not in known and field.contents():
            raise InputError(f"{path}: {key}={field.contents()!r} is not supported.")
    return config


def _scaling(
    get: Callable[..., Any], factors: Any, max_length: int, path: str | Path
) -> RopeScaling | None:
    kind, old_linear = get("rope.scaling.type", "none"), get("rope.scale_linear", 1.0)
    factor = get("rope.scaling.factor", 1.0)
    original = get("rope.scaling.original_context_length", max_length)
    if factors is not None:
        return _llama3(np.ravel(factors.data), get, path)
    if kind == "none" and old_linear != 1.0:
        kind, factor = "linear", old_linear
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", _decimal(factor), original)
    if kind == "yarn":
        return RopeScaling(
            "yarn", _decimal(factor), original, low=1.0, high=32.0,
            attention_factor=yarn_attention_factor(factor),
        )  # fmt: skip
    raise InputError(f"{path} has RoPE scaling of the kind {kind!r}: only linear and yarn "
                     "scaling, and Llama 3's, can be read.")  # fmt: skip


def _llama3(factors: np.ndarray, get: Callable[..., Any], path: str | Path) -> RopeScaling:
    """Llama 3.1's scaling, which the file holds as what each pair's frequency is divided by."""
    scaling = RopeScaling("llama3", _decimal(float(factors.max())), _LLAMA3_LENGTH)
    theta = get("rope.freq_base", 10_000.0)
    expected = rotary.frequencies(2 * len(factors), theta, None) / rotary.frequencies(
        2 * len(factors), theta, scaling
    )
    if not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(
            f"{path} has RoPE scaling by factors ({_LLAMA3_FACTORS}) that are not "
            "Llama 3's: give the model's Hugging Face folder instead."
        )
    return scaling


def _decimal(stored: float) -> float:
    """1e-05 rather than 9.999999747378752e-06: the number that was rounded to float32."""
    return float(str(np.float32(stored)))


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """The file's metadata and tensors; InputError if it is absent, cut short or something else."""
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except Exception as error:  # the reader trips over damage wherever it meets it
        raise InputError(f"{path} is not a whole GGUF file: {error}.") from error


def metadata(reader: gguf.GGUFReader, path: str | Path, key: str, default: Any = _REQUIRED) -> Any:
    """The value of one metadata key; InputError if it is absent and has no default."""
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise InputError(f"{path} has no {key!r} in its metadata: the file is incomplete.")
    return default
