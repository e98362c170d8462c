"""Hugging Face folders: weights from safetensors files straight into their shards, and back.

Nothing is left over: a tensor without a parameter and a parameter without a tensor are errors.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import hf_config, weights
from rho1_jax.models.llama import Params

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_FLOATS = ("F64", "F32", "F16", "BF16")

_STORED = {
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def stored_name(name: str, layer: int | None) -> str:
    """What Hugging Face calls a parameter. Layers' matrices are stored transposed: [out, in]."""
    return _STORED[name] if layer is None else f"model.layers.{layer}.{_STORED[name]}"


def load(
    folder: Path, place: weights.Place = weights.on_first_device
) -> tuple[Params, Architecture]:
    """Parameters (float32, placed by `place`) and shape; InputError for what is not understood."""
    config, tensors = _described(folder)
    twice = tensors.get(_STORED["head"]) if config.tied_head else None
    if twice is not None and not _equal(twice, tensors[_STORED["embed"]]):
        raise InputError(
            f"{folder}: tensor {_STORED['head']!r} has no place in the model that config.json "
            "describes: its head is the embedding, and this is another matrix."
        )

    def find(name: str, layer: int | None) -> Callable[[Any], np.ndarray]:
        stored = tensors[stored_name(name, layer)]
        if layer is None or len(stored.get_shape()) == 1:
            return lambda index: stored[index].astype(np.float32)
        return lambda index: np.ascontiguousarray(stored[index[::-1]].T, np.float32)

    return weights.assemble(config, find, place), config


def architecture(folder: Path) -> Architecture:
    """The shape of a folder's model; InputError as in `load`, for what shows without weights."""
    return _described(folder)[0]


def _described(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """The shape, and every tensor of the folder by name, none of them read."""
    config = hf_config.read(jsonfile.read(folder / "config.json"), folder / "config.json")
    tensors = _open_tensors(folder)
    expected = {stored_name(name, i): shape for name, i, shape in weights.stored_shapes(config)}
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{folder} has no tensor {name!r}: the model is incomplete.")
        stored, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if stored != shape:
            raise InputError(f"{folder}: {name!r} is {stored} where config.json asks for {shape}.")
        if dtype not in _FLOATS:
            raise InputError(
                f"{folder}: {name!r} is stored as {dtype}: only {', '.join(_FLOATS)} can be read."
            )
    for name in tensors.keys() - expected.keys():
        # Old files store the rotary frequencies; a tied head may be stored twice.
        if not name.endswith("rotary_emb.inv_freq") and name != _STORED["head"]:
            raise InputError(
                f"{folder}: tensor {name!r} has no place in the model that config.json describes."
            )
    return config, tensors


def save(
    folder: Path, params: Params, config: Architecture, *, dtype: str, more: Mapping[str, Any]
) -> None:
    """Write config.json (with `more` in it) and the weights, in files of at most 5 GB.

    float32 is bitwise what the parameters are. At most one file's tensors are on the host.
    """
    described = hf_config.describe(config) | {"torch_dtype": dtype, **more}
    shards: list[list[tuple[str, int | None]]] = [[]]
    size = total = 0
    for name, layer, shape in weights.stored_shapes(config):
        n_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, layer))
        size, total = size + n_bytes, total + n_bytes

    weight_map: dict[str, str] = {}
    for i, members in enumerate(shards, 1):
        file = (
            WEIGHTS_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {stored_name(*m): _stored_array(params, *m, dtype) for m in members}
        _write(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        jsonfile.write(folder / INDEX_FILE, index)
    jsonfile.write(folder / "config.json", described)


def _write(tensors: dict[str, np.ndarray], path: Path) -> None:
    """One file, with the mode that the umask gives: the library makes it the owner's alone."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _stored_array(params: Params, name: str, layer: int | None, dtype: str) -> np.ndarray:
    array = params[name] if layer is None else params["layers"][name][layer]
    array = np.asarray(array).astype(jnp.dtype(dtype))
    return np.ascontiguousarray(array if layer is None else array.T)


def _open_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of the folder by name, none of them read."""
    if (folder / INDEX_FILE).exists():
        index = jsonfile.read(folder / INDEX_FILE).get("weight_map", {})
        files = {file: [n for n, f in index.items() if f == file] for file in set(index.values())}
    elif (folder / WEIGHTS_FILE).exists():
        files = {WEIGHTS_FILE: []}
    else:
        refuse_pickles(folder)
        raise InputError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}.")
    tensors: dict[str, Any] = {}
    for file, promised in sorted(files.items()):
        if not (folder / file).exists():
            raise InputError(f"{folder / INDEX_FILE} names {file}, which is not there.")
        try:
            opened = safe_open(folder / file, framework="np")
        except Exception as error:  # the library raises nothing narrower
            raise InputError(
                f"{folder / file} is damaged or cut short ({error}): fetch it again."
            ) from error
        found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        for name in set(promised) - found.keys():
            raise InputError(f"{folder / file} lacks {name!r}, which {INDEX_FILE} places there.")
        tensors |= found
    return tensors


def refuse_pickles(path: Path) -> None:
    """InputError if this file, or the weights of this folder, are a pickle."""
    found = [path] if path.is_file() else sorted(path.iterdir())
    for file in found:
        if file.suffix in _PICKLES:
            raise InputError(
                f"{file} is a pickle, which can run any program when it is opened, so it is not "
                "read: use the model's safetensors files, or have transformers save them."
            )


def _equal(a: Any, b: Any) -> bool:
    """Whether two stored matrices are the same, a few rows at a time."""
    n = a.get_shape()[0]
    parts = [slice(i, min(i + 1024, n)) for i in range(0, n, 1024)]
    return a.get_shape() == b.get_shape() and all(np.array_equal(a[p], b[p]) for p in parts)
