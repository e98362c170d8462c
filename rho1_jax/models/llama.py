"""The decoder: Llama, Mistral, TinyLlama and SmolLM2 are settings of it.

Shapes, one letter per axis:

    B batch   S sequence   N = B*S tokens   D width    V vocabulary   L layers
    H query heads   K key-value heads   hd head size   F feed-forward width

A block, einsum by einsum (x is the residual stream, [N, D]; norm is RMSNorm):

    h        = norm(x)                                    attn_norm [D]
    q        = nd,de->ne      rotated, as [B, S, H, hd]   q [D, H*hd]
    k, v     = nd,de->ne      k rotated, [B, S, K, hd]    k, v [D, K*hd]
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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from rho1_jax.errors import InputError
from rho1_jax.models.attention import causal_attention

Params = dict[str, Any]

_INIT_SCALE = 0.02
_normal = nn.initializers.normal(_INIT_SCALE)
_ones = nn.initializers.ones
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
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True
    window: int | None = None  # tokens a position sees, itself included; None: all before it
    dtype: str = "float32"  # of the computation; parameters are float32 unless the caller casts
    remat: str = "none"  # "none" | "dots" (keep matrix products) | "full" (keep block inputs)
    scan_layers: bool = True  # False: the same stacked parameters, the loop unrolled
    batch_axes: tuple[str, ...] | None = None  # mesh axes the batch is split over

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
    outputs: Any = Decoder(config, rowwise or EveryRow()).apply({"params": params}, tokens)
    return outputs


def param_count(config: LlamaConfig) -> int:
    """Number of parameters; a tied head is counted once."""
    c = config
    attention = 2 * c.width * c.head_dim * (c.n_heads + c.n_kv_heads)
    layer = attention + 3 * c.width * c.ffn_width + 2 * c.width
    embeddings = (1 if c.tied_head else 2) * c.vocab_size * c.width
    return embeddings + c.n_layers * layer + c.width


def flops_per_token(config: LlamaConfig, seq_len: int) -> int:
    """FLOPs of one token's forward pass, head included, two per multiply-add.

    Matrix products only. Attention counts all seq_len keys of every query, the masked half too:
    the convention of PaLM (arXiv 2204.02311, appendix B), which most reported MFU follows.
    A training step is three times this, and the reference's forward pass comes on top.
    """
    c = config
    weights = 2 * c.width * c.head_dim * (c.n_heads + c.n_kv_heads) + 3 * c.width * c.ffn_width
    attention = 2 * seq_len * c.n_heads * c.head_dim
    return 2 * (c.n_layers * (weights + attention) + c.vocab_size * c.width)


@dataclasses.dataclass(frozen=True)
class EveryRow:
    """Calls functions of rows plainly: the exact backward pass. `marks` pass through untouched.

    Another object with these methods may go back through fewer rows (slm/backward.py).
    """

    def start(self, batch: int, seq_len: int) -> Any:  # noqa: ARG002
        """The marks that accompany the residual stream."""
        return None

    def enter(self, marks):
        """Called at the bottom of each block."""
        return marks

    def __call__(self, f, marks, weights, *xs):
        """f(dot, weights, *xs), f acting on each row of the xs [N, ...] by itself."""
        return f(jnp.matmul, weights, *xs), marks

    def finish(self, hidden, marks):  # noqa: ARG002
        """Called at the top of the model."""
        return hidden


class Decoder(nn.Module):
    """Embedding, L blocks, final norm."""

    config: LlamaConfig
    rowwise: Any = EveryRow()

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        batch, seq_len = tokens.shape
        embed = self.param("embed", _normal, (c.vocab_size, c.width))
        x = embed[tokens].astype(c.dtype)
        if c.batch_axes is not None:
            x = jax.lax.with_sharding_constraint(x, PartitionSpec(c.batch_axes, None, None))

        layers = nn.scan(
            _remat(Block, c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.n_layers,
            unroll=1 if c.scan_layers else c.n_layers,
        )
        rotary = _rotary_table(seq_len, c.head_dim, c.rope_theta)
        stream = x.reshape(-1, c.width), self.rowwise.start(batch, seq_len)
        (x, marks), _ = layers(c, self.rowwise, name="layers")(stream, rotary)

        x = _rms_norm(x, self.param("final_norm", _ones, (c.width,)), c.norm_eps)
        x = self.rowwise.finish(x, marks)
        head = embed if c.tied_head else self.param("head", _normal, (c.vocab_size, c.width))
        return x.reshape(batch, seq_len, c.width), head.astype(c.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, each added to the residual stream x [N, D]."""

    config: LlamaConfig
    rowwise: Any = EveryRow()

    @nn.compact
    def __call__(self, stream, rotary):
        c = self.config
        x, marks = stream[0], self.rowwise.enter(stream[1])
        seq_len = rotary.shape[1]
        q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        into_residual = nn.initializers.normal(_INIT_SCALE / math.sqrt(2 * c.n_layers))

        def weight(name, shape, initializer=_normal):
            return self.param(name, initializer, shape).astype(c.dtype)

        def heads(y):
            return y.reshape(-1, seq_len, y.shape[-1] // c.head_dim, c.head_dim)

        def project(_dot, w, h):
            return h @ w

        def after_attention(dot, w, x, h):
            attended = dot(h, w["o"])
            h = _rms_norm(x + attended, w["mlp_norm"], c.norm_eps)
            return attended + (nn.silu(dot(h, w["gate"])) * dot(h, w["up"])) @ w["down"]

        h = _rms_norm(x, self.param("attn_norm", _ones, (c.width,)), c.norm_eps)
        q, marks = self.rowwise(project, marks, weight("q", (c.width, q_width)), h)
        k = _rotate(heads(h @ weight("k", (c.width, kv_width))), rotary)
        v = heads(h @ weight("v", (c.width, kv_width)))
        h = causal_attention(_rotate(heads(q), rotary), k, v, window=c.window)
        weights = {
            "o": weight("o", (q_width, c.width), into_residual),
            "mlp_norm": self.param("mlp_norm", _ones, (c.width,)),
            "gate": weight("gate", (c.width, c.ffn_width)),
            "up": weight("up", (c.width, c.ffn_width)),
            "down": weight("down", (c.ffn_width, c.width), into_residual),
        }
        y, marks = self.rowwise(after_attention, marks, weights, x, h.reshape(-1, q_width))
        return (x + y, marks), None


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


def _rotary_table(seq_len: int, head_dim: int, theta: float) -> Array:
    """Cosine and sine, [2, S, 1, hd/2], of position s in plane i: the angle s * theta^(-2i/hd).

    Rotary position embedding: RoFormer, arXiv 2104.09864, section 3.2.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(seq_len, dtype=jnp.float32)[:, None, None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def _rotate(x: Array, rotary: Array) -> Array:
    """Turn plane i = (x[i], x[i + hd/2]) by its angle: the half-split layout of Hugging Face."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
