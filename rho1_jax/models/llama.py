"""The decoder: Llama, Mistral, TinyLlama, SmolLM2, SmolLM3, Qwen2 and Qwen3 are settings of it.

Shapes, one letter per axis:

    B batch   S sequence   N = B*S tokens   D width    V vocabulary   L layers
    H query heads   K key-value heads   hd head size   F feed-forward width

A block, einsum by einsum (x is the residual stream, [N, D]; norm is RMSNorm):

    h        = norm(x)                                    attn_norm [D]
    q        = nd,de->ne      rotated, as [B, S, H, hd]   q [D, H*hd]
    k, v     = nd,de->ne      k rotated, [B, S, K, hd]    k, v [D, K*hd]
               Qwen2 adds q_bias, k_bias and v_bias; Qwen3 takes the norm of each head of q and k
               (q_norm, k_norm [hd]) before they turn; in SmolLM3's nope_layers nothing turns
    scores   = bshd,bthd->bhst / sqrt(hd)                 t <= s, and s - t < window
    x       += ne,ed->nd      of softmax(scores) v        o [H*hd, D]
    h        = norm(x)                                    mlp_norm [D]
    x       += nf,fd->nd      of silu(h gate) * (h up)    gate, up [D, F], down [F, D]

Parameters are a plain nested dict, each layer's arrays stacked on a leading axis L:

    {"embed": [V, D], "layers": {"q": [L, D, H*hd], ...}, "final_norm": [D], "head": [V, D]}

without "head" where the embedding is also the head. Parameters stay float32 and are cast to the
compute dtype where they are used; norms, rotary angles, attention scores and softmax are float32.
Activations are flattened to [N, D] before every matrix product, [B, S, heads, hd] only around
attention: XLA's CPU backend then takes a fifth less time for a whole training step.

Everything else in this package sees only `init`, `apply` and the dict.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from rho1_jax.errors import InputError
from rho1_jax.models import rotary
from rho1_jax.models.attention import causal_attention
from rho1_jax.models.placement import by_tokens, gathered
from rho1_jax.models.rotary import RopeScaling
from rho1_jax.models.rowwise import EveryRow, times_transposed

Params = dict[str, Any]
# q, k, v of a layer, and what it kept before -> what attention makes of them, and what to keep now.
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

_INIT_SCALE = 0.02
_normal = nn.initializers.normal(_INIT_SCALE)
_ones = nn.initializers.ones
_zeros = nn.initializers.zeros
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and arithmetic of one decoder; hashable, so it can be a static argument."""

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
    dtype: str = "float32"  # of the computation; parameters are float32 unless the caller casts
    remat: str = "none"  # "none" | "dots" (keep matrix products) | "full" (keep block inputs)
    scan_layers: bool = True  # False: the same stacked parameters, the loop unrolled
    batch_axes: tuple[str, ...] | None = None  # mesh axes tokens are split over: placement.py

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
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype={self.dtype!r} must be float32 or bfloat16.")
        if self.remat not in ("none", *_REMAT_POLICIES):
            raise InputError(f"remat={self.remat!r} must be none, dots or full.")
        if not all(0 <= i < self.n_layers for i in self.nope_layers):
            raise InputError(
                f"nope_layers={self.nope_layers} are not among 0..{self.n_layers - 1}."
            )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "LlamaConfig":
        """The config whose dataclasses.asdict went through JSON."""
        fields = dict(stored)
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        fields["nope_layers"] = tuple(fields.get("nope_layers", ()))
        return cls(**fields)


def init(config: LlamaConfig, key: Array) -> Params:
    """Random float32 parameters: our choice, since the paper continues pretrained models.

    normal(0.02) everywhere, the two projections that write to the residual stream (o, down)
    scaled by 1/sqrt(2 L) as in GPT-2, norms at one.
    """
    decoder = Decoder(dataclasses.replace(config, batch_axes=None))
    # Compiled, so that only the draws run and not the forward pass that finds their shapes.
    return jax.jit(decoder.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]


def apply(
    params: Params,
    tokens: Integer[Array | np.ndarray, "B S"],
    *,
    config: LlamaConfig,
    rowwise: Any = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "V D"]]:
    """Hidden states after the final norm, and the head: logits = hidden @ head.T.

    Both are in config.dtype. Logits are left to the caller, who rarely wants all of them at once.
    rowwise: how to call, and go back through, what acts on each row by itself; see EveryRow.
    """
    hidden, head, _ = apply_and_keep(params, tokens, config=config, rowwise=rowwise)
    return hidden, head


def apply_and_keep(
    params: Params,
    tokens: Integer[Array | np.ndarray, "B S"],
    *,
    config: LlamaConfig,
    positions: Integer[Array, "B S"] | None = None,
    attend: Attend | None = None,
    before: Any = None,
    rowwise: Any = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "V D"], Any]:
    """`apply` with other positions than 0..S-1 and other attention than causal.

    Last comes what `attend` kept, that of all layers stacked on a leading axis L, as is `before`,
    what it kept earlier.
    """
    decoder = Decoder(config, attend, rowwise or EveryRow())
    outputs: Any = decoder.apply({"params": params}, tokens, positions, before)
    return outputs


def apply_unstacked(
    params: Params,
    tokens: Integer[Array, "B S"],
    positions: Integer[Array, "B S"],
    before: Sequence[Any],
    *,
    config: LlamaConfig,
    attend: Attend,
) -> tuple[Float[Array, "B S D"], list[Any]]:
    """Hidden states from the tree of decoding.unstack, and what `attend` kept in each layer.

    before: what it kept earlier, layer by layer.
    """
    c = config
    x = _embedded(params["embed"], tokens, c)
    angles = rotary.table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
    all_kept = []
    for i, (layer, own) in enumerate(zip(params["layers"], before, strict=True)):
        rotates = jnp.array(i not in c.nope_layers) if c.nope_layers else None
        block = Block(c, attend, transposed=True)
        (x, _), kept = block.apply({"params": layer}, (x, None), angles, rotates, own)
        all_kept.append(kept)
    x = _rms_norm(x, params["final_norm"], c.norm_eps)
    return x.reshape(*tokens.shape, c.width), all_kept


def param_count(config: LlamaConfig) -> int:
    """Number of parameters; a tied head is counted once."""
    c = config
    attention = 2 * c.width * c.head_dim * (c.n_heads + c.n_kv_heads)
    attention += c.qkv_bias * c.head_dim * (c.n_heads + 2 * c.n_kv_heads)
    attention += c.qk_norm * 2 * c.head_dim
    layer = attention + 3 * c.width * c.ffn_width + 2 * c.width
    embeddings = (1 if c.tied_head else 2) * c.vocab_size * c.width
    return embeddings + c.n_layers * layer + c.width


def flops_per_token(config: LlamaConfig, seq_len: int) -> int:
    """FLOPs of one token's forward pass, head included, two per multiply-add.

    Matrix products only. Attention counts all seq_len keys of every query, the masked half too (the
    convention of PaLM, arXiv 2204.02311, appendix B, which most reported MFU follows), but no more
    than its window.
    A training step is three times this, and the reference's forward pass comes on top.
    """
    c = config
    weights = 2 * c.width * c.head_dim * (c.n_heads + c.n_kv_heads) + 3 * c.width * c.ffn_width
    attention = 2 * min(seq_len, c.window or seq_len) * c.n_heads * c.head_dim
    return 2 * (c.n_layers * (weights + attention) + c.vocab_size * c.width)


class Decoder(nn.Module):
    """Embedding, L blocks, final norm."""

    config: LlamaConfig
    attend: Attend | None = None
    rowwise: Any = EveryRow()

    @nn.compact
    def __call__(self, tokens, positions=None, before=None):
        c = self.config
        batch, seq_len = tokens.shape
        embed = self.param("embed", _normal, (c.vocab_size, c.width))
        x = _embedded(embed, tokens, c)

        layers = nn.scan(
            _remat(Block, c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=c.n_layers,
            unroll=1 if c.scan_layers else c.n_layers,
        )
        positions = jnp.arange(seq_len) if positions is None else positions
        angles = rotary.table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        rotates = None
        if c.nope_layers:
            rotates = jnp.array([i not in c.nope_layers for i in range(c.n_layers)])
        blocks = layers(c, self.attend, self.rowwise, name="layers")
        stream = x, self.rowwise.start(batch, seq_len)
        (x, marks), kept = blocks(stream, angles, rotates, before)

        x = _rms_norm(x, self.param("final_norm", _ones, (c.width,)), c.norm_eps)
        x = self.rowwise.finish(x, marks)
        head = embed if c.tied_head else self.param("head", _normal, (c.vocab_size, c.width))
        head = gathered(head.astype(c.dtype), c.batch_axes, axis=0)
        return x.reshape(batch, seq_len, c.width), head, kept


class Block(nn.Module):
    """Attention and SwiGLU, each added to the residual stream x [N, D].

    transposed: the matrices are stored as [out, in].
    """

    config: LlamaConfig
    attend: Attend | None = None
    rowwise: Any = EveryRow()
    transposed: bool = False

    @nn.compact
    def __call__(self, stream, angles, rotates=None, before=None):
        """`stream` is x with the marks of `rowwise`, `angles` is rotary.table's; q and k are
        rotated unless the boolean `rotates` is False. `before` goes to `attend`."""
        c = self.config
        x, marks = stream[0], self.rowwise.enter(stream[1])
        seq_len = angles.shape[-3]
        q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        into_residual = nn.initializers.normal(_INIT_SCALE / math.sqrt(2 * c.n_layers))
        if rotates is not None:
            unturned = jnp.zeros_like(angles).at[0].set(1.0)
            angles = jnp.where(rotates, angles, unturned)

        matmul = times_transposed if self.transposed else jnp.matmul

        def weight(name, shape, initializer=_normal):
            axis = 0 if name in ("o", "down") else len(shape) - 1
            if self.transposed:
                axis, shape = len(shape) - 1 - axis, shape[::-1]
            w = self.param(name, initializer, shape).astype(c.dtype)
            return gathered(w, c.batch_axes, axis=axis)

        def heads(name, y):
            if c.qkv_bias:
                y += weight(f"{name}_bias", y.shape[-1:], _zeros)
            y = y.reshape(-1, seq_len, y.shape[-1] // c.head_dim, c.head_dim)
            if name == "v":
                return y
            if c.qk_norm:
                y = _rms_norm(y, self.param(f"{name}_norm", _ones, (c.head_dim,)), c.norm_eps)
            return rotary.rotate(y, angles)

        def project(_dot, w, h):
            return matmul(h, w)

        def after_attention(dot, w, x, h):
            dot = matmul if self.transposed else dot
            attended = dot(h, w["o"])
            h = _rms_norm(x + attended, w["mlp_norm"], c.norm_eps)
            return attended + matmul(nn.silu(dot(h, w["gate"])) * dot(h, w["up"]), w["down"])

        h = _rms_norm(x, self.param("attn_norm", _ones, (c.width,)), c.norm_eps)
        q, marks = self.rowwise(project, marks, weight("q", (c.width, q_width)), h)
        q, k, v = (
            heads("q", q),
            heads("k", matmul(h, weight("k", (c.width, kv_width)))),
            heads("v", matmul(h, weight("v", (c.width, kv_width)))),
        )
        if self.attend is None:
            h = causal_attention(q, k, v, window=c.window, batch_axes=c.batch_axes)
            kept = None
        else:
            h, kept = self.attend(q, k, v, before)
        weights = {
            "o": weight("o", (q_width, c.width), into_residual),
            "mlp_norm": self.param("mlp_norm", _ones, (c.width,)),
            "gate": weight("gate", (c.width, c.ffn_width)),
            "up": weight("up", (c.width, c.ffn_width)),
            "down": weight("down", (c.ffn_width, c.width), into_residual),
        }
        y, marks = self.rowwise(after_attention, marks, weights, x, h.reshape(-1, q_width))
        return (x + y, marks), kept


def _embedded(embed: Array, tokens: Array | np.ndarray, c: LlamaConfig) -> Array:
    """The residual stream [N, D] of tokens [B, S]."""
    return by_tokens(embed[tokens.reshape(-1)].astype(c.dtype), c.batch_axes)


def _remat(block, config: LlamaConfig):
    if config.remat == "none":
        return block
    # A scan is its own barrier against merging the recomputed half with the saved one.
    policy = _REMAT_POLICIES[config.remat]
    return nn.remat(block, policy=policy, prevent_cse=not config.scan_layers)


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)
