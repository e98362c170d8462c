"""The loss of the selected tokens, with the head's backward pass on them alone.

The head is two thirds of a small model's work and a twentieth of a large one's. Its forward pass
must see every token, since the losses decide the selection; its backward pass needs the selected
ones only, a share k of N. In units of one product of all N hidden states with the head [V, D]:

    scheme                  forward  again  backward   k=1   k=.6   k=.4   memory, in logits [N, V]
    autodiff                      1      -         2     3      3      3   2
    autodiff in chunks            1      1         2     4      4      4   2 / chunks
    logits kept                   1      -        2k     3    2.2    1.8   1 + k
    logits computed again         1      k        2k     4    2.8    2.2   1 / chunks

The two schemes built here are the last two: never more work than autodiff in the same memory. The
rule is the memory one: logits are kept while all of them, N x V, fit into the budget of
`chunk_tokens` x V; otherwise the losses come chunk by chunk and the selected logits are computed a
second time. Both give the exact gradient. Where all rows are selected none are gathered.

The second pass cuts the *vocabulary* into chunks: each writes its own part of the head's gradient,
where chunks of tokens would read and write all of it every time. A chunk takes every n-th word, so
that it lies evenly on devices that share out the vocabulary.
"""
# ruff: noqa: ARG001 (the primal of a custom_vjp does not use what its backward pass does)

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rho1_jax.slm import losses
from rho1_jax.slm import rows as rows_lib
from rho1_jax.slm.rows import Capacity


def token_losses(
    hidden: Float[Array, "B S D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    *,
    chunk_tokens: int,
) -> tuple[Float[Array, "B S"], Float[Array, "N V"] | None]:
    """Loss of each target, and all logits where they fit into `chunk_tokens`. No gradient."""
    hidden, lm_head = jax.lax.stop_gradient((hidden, lm_head))
    if targets.size > chunk_tokens:
        loss, _ = losses.token_losses(hidden, lm_head, targets, chunk_tokens=chunk_tokens)
        return loss, None
    logits = losses.logits_of(hidden.reshape(-1, hidden.shape[-1]), lm_head)
    return losses.loss_of(logits, targets.reshape(-1)).reshape(targets.shape), logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def selected_sum(
    hidden: Float[Array, "B S D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    weight: Float[Array, "B S"],
    loss: Float[Array, "B S"],
    logits: Float[Array, "N V"] | None,
    capacity: Capacity,
    chunk_tokens: int,
) -> Float[Array, ""]:
    """Sum of weight * loss where the weight is not 0, differentiable in `hidden` and `lm_head`.

    loss, logits: what `token_losses` made of the same hidden states, lm_head and targets.
    capacity: how many rows may have a weight; should more have one, all rows are gone through.
    """
    return losses.masked_sum(weight * loss, weight > 0)


def _forward(hidden, lm_head, targets, weight, loss, logits, capacity, chunk_tokens):
    # The gradients are made here, where the logits are, and only scaled on the way back.
    tokens = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), loss.reshape(-1), logits)

    def everywhere(_):
        return _gradients(tokens, lm_head, weight.reshape(-1), chunk_tokens)

    def on_rows(rows):
        kept, w = jax.tree.map(lambda x: rows_lib.take(x, rows), (tokens, weight.reshape(-1)))
        d_hidden, d_head = _gradients(kept, lm_head, w * rows.weight, chunk_tokens)
        return rows_lib.put(d_hidden, rows), d_head

    if capacity.groups * capacity.rows == weight.size:
        gradients = everywhere(None)
    elif capacity.sure:
        gradients = on_rows(rows_lib.find(weight > 0, capacity))
    else:
        rows = rows_lib.find(weight > 0, capacity)
        gradients = jax.lax.cond(rows.fit, on_rows, everywhere, rows)
    total = losses.masked_sum(weight * loss, weight > 0)
    return total, (gradients[0].reshape(hidden.shape), gradients[1])


def _backward(_capacity, _chunk_tokens, gradients, d_sum):
    d_hidden, d_head = (g * d_sum.astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None, None, None


selected_sum.defvjp(_forward, _backward)


def _gradients(tokens, lm_head, weight, chunk_tokens):
    """Gradients of sum(weight * loss) to hidden [M, D] and to the head [V, D]."""
    hidden, targets, loss, logits = tokens
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_vocab(logits, lm_head, local_targets, log_z):
        p = jnp.exp(logits - log_z[:, None])
        hit = local_targets[:, None] == jnp.arange(lm_head.shape[0])
        d_logits = ((p - hit) * weight[:, None]).astype(hidden.dtype)
        d_hidden = matmul("mv,vd->md", d_logits, lm_head)
        return d_hidden, matmul("mv,md->vd", d_logits, hidden).astype(lm_head.dtype)

    if logits is not None:
        at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        d_hidden, d_head = of_vocab(logits, lm_head, targets, loss + at_target)
        return d_hidden.astype(hidden.dtype), d_head

    vocab, width = lm_head.shape
    n = -(-hidden.shape[0] // chunk_tokens)
    padded = jnp.pad(lm_head, ((0, -vocab % n), (0, 0))).reshape(-1, n, width)  # zeros: no gradient
    log_z = loss + matmul("md,md->m", hidden, lm_head[targets])

    def chunk(d_hidden, j):
        part = padded[:, j]
        local = jnp.where(targets % n == j, targets // n, -1)
        more, d_part = of_vocab(losses.logits_of(hidden, part), part, local, log_z)
        return d_hidden + more, d_part

    d_hidden, d_parts = jax.lax.scan(chunk, jnp.zeros(hidden.shape, jnp.float32), jnp.arange(n))
    d_head = d_parts.swapaxes(0, 1).reshape(-1, width)[:vocab]
    return d_hidden.astype(hidden.dtype), d_head
