"""Splash attention, the flash attention kernel that JAX has for TPUs, laid over a mesh.

The compiler cannot split a kernel over devices: each device runs one on its own rows and heads.
"""

import functools
import math

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rho1_jax.models.placement import Axes, other_axes

_BLOCKS = (512, 256, 128)  # queries, and keys, of a tile: the largest that divides the sequence


def fits(q: Array, k: Array, batch_axes: Axes) -> bool:
    """Whether this is traced for a TPU, in whole tiles, and devices get whole rows and heads.

    The devices are those of the mesh in use, also where they are only described (training/aot.py).
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if (device.platform if device else jax.default_backend()) != "tpu":
        return False
    rows, heads = (math.prod(mesh.shape[a] for a in axes) for axes in _split(batch_axes))
    whole = q.shape[0] % rows == 0 and k.shape[2] % heads == 0
    return whole and q.shape[1] % _BLOCKS[-1] == 0


def attention(
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B S K hd"],
    v: Float[Array, "B S K hd"],
    *,
    window: int | None,
    batch_axes: Axes,
    interpret: bool = False,
) -> Float[Array, "B S H hd"]:
    """What `causal_attention` says, rows split over `batch_axes`, heads over all other mesh axes.

    interpret: run the kernel's Python on any device, for tests.
    """
    on_device = functools.partial(_on_device, window=window, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return on_device(q, k, v)
    rows, heads = _split(batch_axes)
    spec = P(rows, None, heads)
    return jax.shard_map(on_device, in_specs=spec, out_specs=spec, check_vma=False)(q, k, v)


def _split(batch_axes: Axes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that rows are split over, and those that heads are."""
    return batch_axes or (), other_axes(batch_axes)


def _on_device(q, k, v, *, window, interpret):
    seq_len, n_heads, head_dim = q.shape[1:]
    shape = seq_len, seq_len
    mask: masks.Mask = masks.CausalMask(shape)
    if window is not None and window < seq_len:
        mask = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n_heads),
        block_sizes=_tiles(next(b for b in _BLOCKS if seq_len % b == 0)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q * head_dim**-0.5, k, v))  # head-major
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)


def _tiles(block: int) -> kernels.BlockSizes:
    """Square tiles everywhere: forward, and the two kernels of the backward pass."""
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
