"""The decoder: Llama, Mistral, TinyLlama, SmolLM2, SmolLM3, Qwen2 and Qwen3 are settings of it.

Shapes, one letter per axis:

    B batch   S sequence   N = B*S tokens   D width    V vocabulary   L layers
    H query heads   K key-value heads   hd head size   F feed-forward width

A block, einsum by einsum (x is the residual stream, [N, D]; norm is RMSNorm):

    h        = norm(x)                                    attn_norm [D]
    q        = nd,de->ne      rotated, as [B, S, H, hd]   q [D, H*hd]
    k, v     = nd,de->ne      k rotated, [B, S, K, hd]    k, v [D, K*hd]
               Qwen2 adds q_bias, k_bias and v_bias; Qwen3 takes the norm of each head of q and k
               (q_norm, k_norm [hd]) before RoPE; SmolLM3's nope_layers have none
    scores   = bshd,bthd->bhst / sqrt(hd)                 t <= s, s - t < window, same document
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

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from rho1_jax.models import documents, rotary
from rho1_jax.models.architecture import Architecture as Architecture
from rho1_jax.models.architecture import LlamaConfig as LlamaConfig
from rho1_jax.models.attention import causal_attention
from rho1_jax.models.placement import by_tokens, gathered
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


def init(config: Architecture, key: Array) -> Params:
    """Random float32 parameters: our choice, since the paper continues pretrained models.

    normal(0.02) everywhere, the two projections that write to the residual stream (o, down)
    scaled by 1/sqrt(2 L) as in GPT-2, norms at one.
    """
    decoder = Decoder(config.computed())
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
    With a config.separator the documents of a row are computed as if each had a row of its own
    (documents.py); without, a row is one text.
    rowwise: how to call, and go back through, what acts on each row by itself; see EveryRow.
    """
    apart = config.separator
    starts = None if apart is None else documents.starts(tokens, apart)
    decoder = Decoder(config, None, rowwise or EveryRow())
    hidden, head, _ = decoder.apply({"params": params}, tokens, starts=starts)  # type: ignore[misc]
    return hidden, head


def apply_and_keep(
    params: Params,
    tokens: Integer[Array | np.ndarray, "B S"],
    *,
    config: LlamaConfig,
    positions: Integer[Array, "B S"] | None = None,
    attend: Attend | None = None,
    before: Any = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "V D"], Any]:
    """`apply` to rows of one text, with other positions than 0..S-1 and attention than causal.

    Last comes what `attend` kept, that of all layers stacked on a leading axis L, as is `before`,
    what it kept earlier.
    """
    decoder = Decoder(config, attend)
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
        block = Block(c, attend, EveryRow(times_transposed), transposed=True)
        (x, _), kept = block.apply({"params": layer}, (x, None), angles, rotates, own)
        all_kept.append(kept)
    x = _rms_norm(x, params["final_norm"], c.norm_eps)
    return x.reshape(*tokens.shape, c.width), all_kept


def param_count(config: Architecture) -> int:
    """Number of parameters; a tied head is counted once."""
    c = config
    attention = 2 * c.width * c.head_dim * (c.n_heads + c.n_kv_heads)
    attention += c.qkv_bias * c.head_dim * (c.n_heads + 2 * c.n_kv_heads)
    attention += c.qk_norm * 2 * c.head_dim
    layer = attention + 3 * c.width * c.ffn_width + 2 * c.width
    embeddings = (1 if c.tied_head else 2) * c.vocab_size * c.width
    return embeddings + c.n_layers * layer + c.width


def flops_per_token(config: Architecture, seq_len: int) -> int:
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
    def __call__(self, tokens, positions=None, before=None, starts=None):
        """starts: where the documents of the rows begin (documents.py), which says all positions;
        None: rows are one text."""
        c = self.config
        batch, seq_len = tokens.shape
        embed = self.param("embed", _normal, (c.vocab_size, c.width))
        x = _embedded(embed, tokens, c)

        layers = nn.scan(
            _remat(Block, c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0, nn.broadcast),
            length=c.n_layers,
            unroll=1 if c.scan_layers else c.n_layers,
        )
        lengths = None
        if starts is not None:
            positions, lengths = documents.positions(starts), documents.lengths(starts)
        positions = jnp.arange(seq_len) if positions is None else positions
        angles = rotary.table(positions, c.head_dim, c.rope_theta, c.rope_scaling, lengths)
        rotates = None
        if c.nope_layers:
            rotates = jnp.array([i not in c.nope_layers for i in range(c.n_layers)])
        blocks = layers(c, self.attend, self.rowwise, name="layers")
        stream = x, self.rowwise.start(batch, seq_len)
        (x, marks), kept = blocks(stream, angles, rotates, before, starts)

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
    def __call__(self, stream, angles, rotates=None, before=None, starts=None):
        """`stream` is x with the marks of `rowwise`, `angles` is rotary.table's; q and k are
        rotated unless the boolean `rotates` is False. `before` goes to `attend`, `starts` to
        attention where there is no `attend`."""
        c, (x, marks) = self.config, stream
        w, marks = self._attention_weights(), self.rowwise.enter(marks)
        angles = _unless(rotates, angles)

        h = _rms_norm(x, w["attn_norm"], c.norm_eps)
        q, marks = self.rowwise(self._query, marks, w["q"], h)
        q = _heads("q", q, w, angles, c)
        k = _heads("k", self._times(h, w["k"]), w, angles, c)
        v = _heads("v", self._times(h, w["v"]), w, angles, c)
        h, kept = self.attend(q, k, v, before) if self.attend else self._attend(q, k, v, starts)
        h = h.reshape(-1, c.n_heads * c.head_dim)
        y, marks = self.rowwise(self._after_attention, marks, self._later_weights(), x, h)
        return (x + y, marks), kept

    @nn.nowrap
    def _query(self, _dot, w, h):
        return self._times(h, w)

    @nn.nowrap
    def _attend(self, q, k, v, starts):
        c, causal = self.config, causal_attention
        return causal(q, k, v, starts=starts, window=c.window, batch_axes=c.batch_axes), None

    @nn.nowrap
    def _after_attention(self, dot, w, x, h):
        """What the block adds to x. `dot` multiplies where the backward pass needs the product."""
        attended = dot(h, w["o"])
        h = _rms_norm(x + attended, w["mlp_norm"], self.config.norm_eps)
        return attended + self._times(nn.silu(dot(h, w["gate"])) * dot(h, w["up"]), w["down"])

    @nn.nowrap
    def _times(self, x, w):
        return times_transposed(x, w) if self.transposed else jnp.matmul(x, w)

    @nn.nowrap
    def _attention_weights(self) -> dict[str, Array]:
        c = self.config
        w = {"attn_norm": self.param("attn_norm", _ones, (c.width,))}
        for name, n_heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads)):
            w[name] = self._weight(name, (c.width, n_heads * c.head_dim))
            if c.qkv_bias:
                w[f"{name}_bias"] = self._weight(f"{name}_bias", (n_heads * c.head_dim,), _zeros)
            if c.qk_norm and name != "v":
                w[f"{name}_norm"] = self.param(f"{name}_norm", _ones, (c.head_dim,))
        return w

    @nn.nowrap
    def _later_weights(self) -> dict[str, Array]:
        c = self.config
        into_residual = nn.initializers.normal(_INIT_SCALE / math.sqrt(2 * c.n_layers))
        return {
            "o": self._weight("o", (c.n_heads * c.head_dim, c.width), into_residual),
            "mlp_norm": self.param("mlp_norm", _ones, (c.width,)),
            "gate": self._weight("gate", (c.width, c.ffn_width)),
            "up": self._weight("up", (c.width, c.ffn_width)),
            "down": self._weight("down", (c.ffn_width, c.width), into_residual),
        }

    @nn.nowrap
    def _weight(self, name: str, shape: tuple[int, ...], initializer=_normal) -> Array:
        """A parameter in the compute dtype, laid out as its product takes it."""
        axis = 0 if name in ("o", "down") else len(shape) - 1
        if self.transposed:
            axis, shape = len(shape) - 1 - axis, shape[::-1]
        w = self.param(name, initializer, shape).astype(self.config.dtype)
        return gathered(w, self.config.batch_axes, axis=axis)


def _heads(name: str, y: Array, w: dict[str, Array], angles: Array, c: LlamaConfig) -> Array:
    """q, k or v [N, heads * hd] as [B, S, heads, hd]; q and k normed (Qwen3) and rotated."""
    if c.qkv_bias:
        y += w[f"{name}_bias"]
    y = y.reshape(-1, angles.shape[-3], y.shape[-1] // c.head_dim, c.head_dim)
    if name == "v":
        return y
    if c.qk_norm:
        y = _rms_norm(y, w[f"{name}_norm"], c.norm_eps)
    return rotary.rotate(y, angles)


def _unless(rotates: Array | None, angles: Array) -> Array:
    """The angles; where `rotates` is False, those of position 0."""
    if rotates is None:
        return angles
    return jnp.where(rotates, angles, jnp.zeros_like(angles).at[0].set(1.0))


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
