"""Weights from other people's files, in the tree that models/llama.py describes: GGUF so far.

GGUF stores a matrix as [out, in] where ours are [in, out], and each layer under its own name. It
also reorders the rows of q and k within each head, because llama.cpp rotates neighbours
(x[2i], x[2i+1]) where llama.py rotates halves (x[i], x[i + hd/2]).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rho1_jax.errors import InputError
from rho1_jax.models.llama import LlamaConfig, Params

_REQUIRED = object()


def load(path: str | Path) -> tuple[Params, LlamaConfig]:
    """Parameters (float32 numpy arrays) and shape of a GGUF file of the architecture "llama".

    Quantised tensors become float32; layers are stacked, q and k put back into half-split order.

    Raises InputError for any other file, and for a damaged or incomplete one, saying what is wrong.
    """
    if Path(path).suffix != ".gguf":
        raise InputError(f"{path} is no .gguf file, the one format that weights are read from.")
    reader = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors:
        raise InputError(f"{path} stretches its rotary positions, which llama.py does not.")
    config = _config(reader, path, tied_head="output.weight" not in tensors)

    def read(name: str, *shape: int) -> np.ndarray:
        return _dequantized(tensors, f"{name}.weight", shape, path)

    c = config
    params: dict[str, Any] = {
        "embed": read("token_embd", c.vocab_size, c.width),
        "layers": _layers(read, config),
        "final_norm": read("output_norm", c.width),
    }
    if not c.tied_head:
        params["head"] = read("output", c.vocab_size, c.width)
    return params, config


def _layers(read: Callable[..., np.ndarray], c: LlamaConfig) -> dict[str, np.ndarray]:
    """Every layer tensor, all layers stacked on the first axis."""
    q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    def stack(name: str, layer: Callable[[str], np.ndarray]) -> np.ndarray:
        return np.stack([layer(f"blk.{i}.{name}") for i in range(c.n_layers)])

    def matrix(name: str, d_in: int, d_out: int) -> np.ndarray:
        return stack(name, lambda layer: read(layer, d_out, d_in).T)

    def rotated(name: str, d_out: int) -> np.ndarray:
        return stack(name, lambda layer: _pairs_to_halves(read(layer, d_out, c.width), c).T)

    return {
        "attn_norm": stack("attn_norm", lambda layer: read(layer, c.width)),
        "q": rotated("attn_q", q_width),
        "k": rotated("attn_k", kv_width),
        "v": matrix("attn_v", c.width, kv_width),
        "o": matrix("attn_output", q_width, c.width),
        "mlp_norm": stack("ffn_norm", lambda layer: read(layer, c.width)),
        "gate": matrix("ffn_gate", c.width, c.ffn_width),
        "up": matrix("ffn_up", c.width, c.ffn_width),
        "down": matrix("ffn_down", c.ffn_width, c.width),
    }


def _pairs_to_halves(rows: np.ndarray, c: LlamaConfig) -> np.ndarray:
    """Rows 0, 2, 4, .. of each head first, then 1, 3, 5, ..: [heads*hd, D]."""
    pairs = rows.reshape(-1, c.head_dim // 2, 2, c.width)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantized(tensors: dict, name: str, shape: tuple[int, ...], path: str | Path) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"{path} has no tensor {name!r}: the file is incomplete.")
    stored = tuple(int(n) for n in reversed(tensors[name].shape))
    if stored != shape:
        raise InputError(
            f"{path}: tensor {name!r} is {stored} where its metadata asks for {shape}."
        )
    try:
        array = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
    except NotImplementedError as error:
        raise InputError(f"{path}: tensor {name!r} cannot be read: {error}.") from error
    return np.array(array, np.float32)  # a copy: a view would keep the file mapped


def _config(reader: gguf.GGUFReader, path: str | Path, *, tied_head: bool) -> LlamaConfig:
    architecture = metadata(reader, path, "general.architecture")
    if architecture != "llama":
        raise InputError(
            f"{path} holds a model of the architecture {architecture!r}: only 'llama' can be read "
            "(Llama, TinyLlama, Mistral and SmolLM2 are stored as such)."
        )

    def get(key: str, default: Any = _REQUIRED) -> Any:
        return metadata(reader, path, f"llama.{key}", default)

    if get("rope.scaling.type", "none") != "none":
        raise InputError(f"{path} stretches its rotary positions, which llama.py does not.")
    width, n_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // n_heads)
    return LlamaConfig(
        vocab_size=get("vocab_size", len(metadata(reader, path, "tokenizer.ggml.tokens", []))),
        width=width,
        n_layers=get("block_count"),
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_width=get("feed_forward_length"),
        rope_theta=_decimal(get("rope.freq_base", 10_000.0)),
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        tied_head=tied_head,
        window=get("attention.sliding_window", None),
    )


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
