"""Causal attention: the flash attention of TPU and CUDA where it fits, else blocks of einsum."""

import functools

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jaxtyping import Array, Bool, Float, Int32

from rho1_jax.models import blockwise, placement, splash
from rho1_jax.models.placement import Axes

_BLOCK = 128


def causal_attention(
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K hd"],
    *,
    starts: Int32[Array, "B S"] | None = None,
    window: int | None = None,
    batch_axes: Axes = None,
) -> Float[Array, "B S H hd"]:
    """Softmax attention in which position s sees s - window + 1 .. s (None: 0 .. s).

    Keys and values are those of T >= S positions, queries those of the last S of them; the kernels
    are for T = S. starts: the first position that s sees, for T = S: where its document begins
    (documents.py); None: 0.
    Query heads h*H/K .. (h+1)*H/K - 1 share key-value head h; k and v are never repeated.
    Scores and softmax are float32 whatever the inputs are. batch_axes: mesh axes that tokens are
    split over (placement.py); under context parallelism each device gathers the keys and values
    of its rows and attends with its own queries.
    """
    # One token is what parameters are drawn with: no kernel is missed there.
    square = q.shape[1] == k.shape[1] > 1
    if square and splash.fits(q, k, batch_axes):
        return splash.attention(q, k, v, starts=starts, window=window, batch_axes=batch_axes)
    cut = placement.parts(batch_axes) > 1
    if not (square and _cudnn_fits(q, cut=cut)):
        in_parts = functools.partial(_attend_in_parts, batch_axes=batch_axes)
        return (in_parts if cut else _attend_in_blocks)(q, k, v, starts, window)
    local = None if window is None else (window - 1, 0)
    mask = None if starts is None else _same_document(starts, jnp.arange(k.shape[1]))[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def cached_attention(
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B K T hd"],
    v: Float[Array, "B K T hd"],
    visible: Bool[Array, "B S T"],
) -> Float[Array, "B S H hd"]:
    """A few queries per row against keys and values laid out by heads, each with its own mask."""
    batch, seq_len, _, head_dim = q.shape
    q_rows = (q * head_dim**-0.5).reshape(batch, seq_len, k.shape[1], -1, head_dim)
    out = _attend(q_rows.transpose(0, 2, 3, 1, 4), k, v, visible[:, None, None])
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _cudnn_fits(q: Array, *, cut: bool) -> bool:
    """Whether this is traced for CUDA, and cuDNN takes it; else why it does not is logged once."""
    if "cuda" not in get_backend().platform_version:
        return False
    not_used = functools.partial(placement.kernel_not_used, "GPU", "cuDNN")
    if cut:
        not_used("context parallelism (mesh.sequence) has no kernel there")
    elif q.dtype != jnp.bfloat16:
        not_used(f"it takes bfloat16, not {q.dtype}")
    elif q.shape[-1] % 8 or q.shape[-1] > 128:
        not_used(f"it takes heads of a multiple of 8 up to 128 numbers, not of {q.shape[-1]}")
    else:
        return True
    return False


def _one_cpu() -> bool:
    """Whether what a row holds may decide what is computed: on one device, since others would wait
    for its rows, and no accelerator, which would ask the host."""
    mesh = jax.sharding.get_abstract_mesh()
    return placement.platform() == "cpu" and (mesh.empty or mesh.size == 1)


def _attend_in_blocks(
    q: Array, k: Array, v: Array, starts: Array | None, window: int | None
) -> Array:
    """Attention block of queries by block, each with only the keys that some query of it sees.

    Against jax.nn.dot_product_attention, forward and backward in float32 on two CPU cores, it
    takes 0.41 of the time at B=16 S=256 H=4 hd=32 and 0.26 at B=4 S=1024 H=9 K=3 hd=64.
    """
    batch, seq_len, n_heads, head_dim = q.shape
    earlier = k.shape[1] - seq_len
    # Head-major, so that each product is one plain matrix product per head.
    q = (q * head_dim**-0.5).reshape(batch, seq_len, k.shape[2], -1, head_dim)
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, H/K, S, hd]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, hd]

    if starts is not None and _one_cpu():
        out = blockwise.attend(q, k, v, starts, window)
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq_len, n_heads, head_dim)

    blocks = []
    for start in range(0, seq_len, _BLOCK):
        stop = min(start + _BLOCK, seq_len)
        first_key = 0 if window is None else max(0, earlier + start - window + 1)
        keys = slice(first_key, earlier + stop)
        distance = earlier + jnp.arange(start, stop)[:, None] - jnp.arange(keys.start, keys.stop)
        visible = _visible(distance, window)
        if starts is not None:
            own = _same_document(starts[:, start:stop], jnp.arange(keys.start, keys.stop))
            visible &= own[:, None, None]
        blocks.append(_attend(q[..., start:stop, :], k[:, :, keys], v[:, :, keys], visible))
    out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq_len, n_heads, head_dim)


def _attend_in_parts(
    q: Array, k: Array, v: Array, starts: Array | None, window: int | None, batch_axes: Axes
) -> Array:
    """Context parallelism: as in blocks, but of every device's part P of the rows at once; the mask
    alone says which keys each part's queries see."""
    batch, seq_len, n_heads, head_dim = q.shape
    parts = placement.parts(batch_axes)
    q = (q * head_dim**-0.5).reshape(batch, parts, -1, k.shape[2], n_heads // k.shape[2], head_dim)
    q = q.transpose(0, 3, 1, 4, 2, 5)  # [B, K, P, H/K, S/P, hd]
    k, v = (placement.whole_rows(x.transpose(0, 2, 1, 3), batch_axes) for x in (k, v))
    positions = jnp.arange(seq_len).reshape(parts, 1, -1, 1)

    blocks = []
    for start in range(0, seq_len // parts, _BLOCK):
        block = slice(start, start + _BLOCK)
        visible = _visible(positions[:, :, block] - jnp.arange(seq_len), window)
        if starts is not None:
            own = starts.reshape(batch, 1, parts, 1, -1)[..., block]
            visible &= _same_document(own, jnp.arange(seq_len))
        blocks.append(_attend(q[..., block, :], k, v, visible))
    out = jnp.concatenate(blocks, axis=4)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(batch, seq_len, n_heads, head_dim)


def _visible(distance: Array, window: int | None) -> Array:
    """Whether a query sees the key that lies `distance` before it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _same_document(starts: Array, places: Array) -> Array:
    """Whether keys at `places` [t] are not before what queries see first [.., s]: [.., s, t]."""
    return places >= starts[..., None]


def _attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """q [B, K, .., s, hd], k and v [B, K, t, hd] -> [B, K, .., s, hd]; visible [.., s, t], or with
    all axes of the scores, those of one where it is the same."""
    # A group's queries are rows of one matrix: the shared keys are read once.
    rows = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jnp.einsum("bkrd,bktd->bkrt", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(*q.shape[:-1], -1)
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.reshape(*rows.shape[:3], -1).astype(v.dtype)
    out = jnp.einsum("bkrt,bktd->bkrd", weights, v, preferred_element_type=jnp.float32)
    # Dividing after the product touches hd numbers per query where softmax would touch t.
    return (out.reshape(q.shape) / total).astype(v.dtype)
