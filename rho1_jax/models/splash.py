"""Splash attention, the flash attention kernel that JAX has for TPUs, laid over a mesh.

The compiler cannot split a kernel over devices: each device runs one on its own rows and heads.
Where rows are cut, it runs one on its own queries, against the keys and values of whole rows.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from rho1_jax.models import placement
from rho1_jax.models.placement import Axes

_BLOCKS = (512, 256, 128)  # queries, and keys, of a tile: the largest that divides a device's


def fits(q: Array, k: Array, batch_axes: Axes) -> bool:
    """Whether this is traced for a TPU, in whole tiles, and devices get whole rows and heads.

    The devices are those of the mesh in use, also where they are only described (planning/aot.py).
    """
    if placement.platform() != "tpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    rows, sequence, heads = (math.prod(mesh.shape[a] for a in axes) for axes in _split(batch_axes))
    tile = sequence * _BLOCKS[-1]
    not_used = functools.partial(placement.kernel_not_used, "TPU", "splash")
    if q.shape[1] % tile:
        not_used(f"the sequence length is no multiple of {tile}")
    elif q.shape[0] % rows:
        not_used(f"rows do not divide over {rows} devices")
    elif k.shape[2] % heads:
        not_used(f"key-value heads do not divide over {heads} devices")
    else:
        return True
    return False


def attention(
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B S K hd"],
    v: Float[Array, "B S K hd"],
    *,
    starts: Int32[Array, "B S"] | None = None,
    window: int | None,
    batch_axes: Axes,
    interpret: bool = False,
) -> Float[Array, "B S H hd"]:
    """What `causal_attention` says: tokens split over `batch_axes`, heads over all other mesh axes.

    interpret: run the kernel's Python on any device, for tests.
    """
    rows, sequence, heads = _split(batch_axes)
    mesh = jax.sharding.get_abstract_mesh()
    n_heads = q.shape[2] // math.prod(mesh.shape[axis] for axis in heads)
    parts = placement.parts(batch_axes)
    kernel = _kernel(q.shape[1], n_heads, parts=parts, window=window, interpret=interpret)

    # Where two positions' documents begin says whether they are the same, as well as a number does.
    of_documents = () if starts is None else (kernels.SegmentIds(starts, starts),)

    def on_device(kernel, q, k, v, *of_documents):
        if parts > 1:
            k, v = (jax.lax.all_gather(x, sequence, axis=1, tiled=True) for x in (k, v))
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # head-major
        return jax.vmap(kernel)(q, k, v, *of_documents).swapaxes(1, 2)

    if mesh.empty:
        return on_device(kernel, q, k, v, *of_documents)
    spec = P(rows, sequence, heads)
    of_ids: Any = (P(rows, sequence), P(rows))
    more = [kernels.SegmentIds(*of_ids)] * len(of_documents)
    # Each device gets the part of the mask that is its queries'.
    of_queries = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, sequence)))
    mapped = jax.shard_map(
        on_device, in_specs=(of_queries, spec, spec, spec, *more), out_specs=spec, check_vma=False
    )
    return mapped(kernel, q, k, v, *of_documents)


def _split(batch_axes: Axes) -> tuple[tuple[str, ...], ...]:
    """The axes that whole rows lie on, those that cut them, and those that heads are split over."""
    return *placement.split(batch_axes), placement.other_axes(batch_axes)


def _kernel(
    seq_len: int, n_heads: int, *, parts: int, window: int | None, interpret: bool
) -> kernels.SplashAttentionKernel:
    """The kernel for the queries of one of `parts` parts of a row against all of its keys."""
    shape = seq_len, seq_len
    mask: masks.Mask = masks.CausalMask(shape)
    if window is not None and window < seq_len:
        mask = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n_heads),
        block_sizes=_tiles(next(b for b in _BLOCKS if seq_len % (parts * b) == 0)),
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
    )


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
