"""Token losses from hidden states, never holding the logits of a whole batch; masked sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params = Any
# Parameters and inputs [B, S] -> hidden states [B, S, D] and the head matrix [V, D].
Apply = Callable[[Params, Int[Array, "B S"]], tuple[Float[Array, "B S D"], Float[Array, "V D"]]]


def next_token_losses(
    apply: Apply,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    chunk_tokens: int,
    entropy: bool = False,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"] | None]:
    """Loss (and, if asked, predictive entropy) in nats of each target of rows [B, T = S+1]."""
    hidden, head = apply(params, tokens[:, :-1])
    return token_losses(hidden, head, tokens[:, 1:], chunk_tokens=chunk_tokens, entropy=entropy)


def token_losses(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    *,
    chunk_tokens: int,
    entropy: bool = False,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"] | None]:
    """-log p(target) and, if asked, the entropy of p: float32, nats, [B, S].

    At most about `chunk_tokens` x V logits exist at once; more tokens are done in chunks whose
    logits are recomputed in the backward pass. A chunk takes every n-th token of each row, so that
    it lies evenly on all devices, also where they share rows.
    """

    def dense(hidden, targets):
        return _dense(hidden, head, targets, entropy)

    return _in_chunks(dense, chunk_tokens, hidden, targets)


def top_log_probs(
    hidden: Float[Array, "B S D"], head: Float[Array, "V D"], n: int, *, chunk_tokens: int
) -> tuple[Float[Array, "B S n"], Int[Array, "B S n"]]:
    """Log-probabilities of the n likeliest tokens at each place, the first the likeliest, and which
    they are; as many logits at once as in `token_losses`."""

    def dense(hidden):
        logits = logits_of(hidden.reshape(-1, hidden.shape[-1]), head)
        best, ids = jax.lax.top_k(logits, n)
        best -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return best.reshape(*hidden.shape[:2], n), ids.reshape(*hidden.shape[:2], n)

    return _in_chunks(dense, chunk_tokens, hidden)


def top_divergence(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    log_probs: Float[Array, "B S n"],
    ids: Int[Array, "B S n"],
    *,
    chunk_tokens: int,
) -> Float[Array, "B S"]:
    """KL(p || q) in nats at each place, q the prediction of `hidden` and p that of which the n
    likeliest tokens are known; all others count as one outcome on both sides. [B, S].

    So it is 0 where q agrees with all that is known of p, unlike a sum over the n alone, which
    favours a q that is too sure of them. A product with the head of its own: forward and, in
    chunks, again and backward, for all tokens.
    """

    def dense(hidden, log_p, ids):
        shape, n = hidden.shape[:2], ids.shape[-1]
        log_p, ids = log_p.reshape(-1, n), ids.reshape(-1, n)
        logits = logits_of(hidden.reshape(-1, hidden.shape[-1]), head)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        log_q = jnp.take_along_axis(logits, ids, axis=-1) - log_z
        others = logits.at[jnp.arange(len(ids))[:, None], ids].set(-1e30)
        log_q_rest = (jax.nn.logsumexp(others, axis=-1, keepdims=True) - log_z)[:, 0]
        p = jnp.exp(log_p)
        p_rest = jnp.maximum(1.0 - p.sum(axis=-1), 0.0)
        kl = jnp.sum(p * (log_p - log_q), axis=-1)
        kl += jax.scipy.special.xlogy(p_rest, p_rest) - p_rest * log_q_rest
        return kl.reshape(shape)

    return _in_chunks(dense, chunk_tokens, hidden, log_probs, ids)


def _in_chunks(dense, chunk_tokens: int, hidden: Array, *more: Array):
    """dense(hidden [B, S, D], *more [B, S, ...]), a tree of [B, S, ...], some tokens at a time."""
    b, s, _ = hidden.shape
    n_chunks = -(-s // max(1, chunk_tokens // b))
    if n_chunks == 1:
        return dense(hidden, *more)

    width = -(-s // n_chunks)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, n_chunks * width - s), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(b, width, n_chunks, *x.shape[2:]), 2, 0)

    chunk = jax.checkpoint(dense)
    # The head is closed over: as a carry of the scan it would be saved once per chunk.
    _, out = jax.lax.scan(lambda _, x: (None, chunk(*x)), None, tuple(map(cut, (hidden, *more))))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(b, -1, *x.shape[3:])[:, :s], out)


def masked_sum(x: Float[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, ""]:
    """Sum of x where mask is True; what is masked out may be anything, even NaN."""
    return jnp.sum(x, where=mask)


def logits_of(hidden: Float[Array, "N D"], head: Float[Array, "V D"]) -> Float[Array, "N V"]:
    """Logits in float32, whatever the inputs are."""
    return jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)


def loss_of(logits: Float[Array, "N V"], targets: Int[Array, " N"]) -> Float[Array, " N"]:
    """-log p(target) in nats."""
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_target


def _dense(hidden, head, targets, entropy):
    logits = logits_of(hidden.reshape(-1, hidden.shape[-1]), head)
    loss = loss_of(logits, targets.reshape(-1)).reshape(targets.shape)
    if not entropy:
        return loss, None
    log_z = jax.nn.logsumexp(logits, axis=-1)
    mean_logit = jnp.sum(jnp.exp(logits - log_z[:, None]) * logits, axis=-1)
    return loss, (log_z - mean_logit).reshape(targets.shape)
