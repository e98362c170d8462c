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
    b, s, d = hidden.shape
    n_chunks = -(-s // max(1, chunk_tokens // b))
    if n_chunks == 1:
        return _dense(hidden, head, targets, entropy)

    width = -(-s // n_chunks)
    pad = n_chunks * width - s
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(b, width, n_chunks, d)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(b, width, n_chunks)

    @jax.checkpoint
    def chunk(hidden, targets):
        return _dense(hidden, head, targets, entropy)

    # The head is closed over: as a carry of the scan it would be saved once per chunk.
    xs = jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(targets, 2, 0)
    _, out = jax.lax.scan(lambda _, x: (None, chunk(*x)), None, xs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(b, -1)[:, :s], out)


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
