"""The training step of Selective Language Modeling (paper, section 2.2).

Read `train_step` and `select` (selection.py): that is the whole method. Everything is a pure
function of arrays; the model comes in as a function, the reference as an argument of its own that
is never differentiated, updated or saved.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from rho1_jax.errors import InputError
from rho1_jax.slm import head, losses, rows
from rho1_jax.slm.losses import Apply, Params, masked_sum
from rho1_jax.slm.scores import Signals
from rho1_jax.slm.selection import Selection, select

Metrics = dict[str, Float[Array, ""]]


class Batch(NamedTuple):
    """Packed rows. With cached `ref_loss` (and `ref_entropy`) the reference pass is skipped.

    `utility` is a score computed beforehand. `useful` is the truth about each target where a corpus
    knows it; it only feeds metrics.
    """

    tokens: Int[Array, "B S+1"]
    valid: Bool[Array, "B S"]
    ref_loss: Float[Array, "B S"] | None = None
    ref_entropy: Float[Array, "B S"] | None = None
    utility: Float[Array, "B S"] | None = None
    useful: Bool[Array, "B S"] | None = None


class TrainState(NamedTuple):
    """`average` is a moving average of `params`, kept only where it serves as the reference."""

    step: Int32[Array, ""]
    params: Params
    opt_state: Any
    average: Params | None = None


def init_state(
    params: Params, tx: optax.GradientTransformation, average: Params | None = None
) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def train_step(
    state: TrainState,
    ref_params: Params | None,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    apply: Apply,
    ref_apply: Apply,
    tx: optax.GradientTransformation,
    selection: Selection,
    chunk_tokens: int,
    accumulation: int = 1,
    decay: float = 1.0,
) -> tuple[TrainState, Metrics]:
    """One SLM update. Pure: (state, reference, batch, key) -> (state, metrics).

    The loss is the sum over selected tokens divided by their number, both taken over all
    microbatches and devices (a mean of means would favour microbatches with few selected tokens);
    with a floor, the weighted sum divided by the sum of the weights.
    Metrics are sums and counts over the batch, plus the gradient's norm.

    With `accumulation` > 1 the rows are spread over that many microbatches, so B must divide by it.
    Under scope "batch" they must all be scored before any can be masked: one more forward pass.
    `key` seeds the random control; it is folded with the step.

    A state with an `average` takes that as its reference, not `ref_params`: a different method, in
    which the reference follows the policy by average <- decay * average + (1 - decay) * params.
    """
    key = jax.random.fold_in(key, state.step)
    ratio = selection.ratio_at(state.step)
    ref_params = ref_params if state.average is None else state.average

    def signals(loss: Float[Array, "b S"], part: Batch, key: PRNGKeyArray | None) -> Signals:
        return _signals(loss, ref_params, part, key, ref_apply, selection, chunk_tokens)

    def grad_of(part: Batch, key: PRNGKeyArray, mask: Bool[Array, "b S"] | None):
        """Gradient and metrics of the loss *summed* over the selected tokens of one microbatch."""
        inputs, targets = part.tokens[:, :-1], part.tokens[:, 1:]
        capacity = rows.capacity(selection, *targets.shape, accumulated=accumulation > 1)

        def loss_fn(params: Params):
            hidden, words = apply(params, inputs)
            loss, logits = head.token_losses(hidden, words, targets, chunk_tokens=chunk_tokens)
            s = signals(loss, part, key)
            chosen = select(selection, s, ratio) if mask is None else mask
            weight = selection.weights(chosen, s.valid)
            total = head.selected_sum(
                hidden, words, targets, weight, loss, logits, capacity, chunk_tokens
            )
            return total, _metric_sums(s, chosen, part.useful)

        return jax.grad(loss_fn, has_aux=True)(state.params)

    def policy_loss(part: Batch) -> Float[Array, "b S"]:
        return losses.next_token_losses(
            apply, state.params, part.tokens, chunk_tokens=chunk_tokens
        )[0]

    if accumulation == 1:
        grads, metrics = grad_of(batch, key, None)
    else:
        parts, mask = jax.tree.map(lambda x: _split(x, accumulation), batch), None
        if selection.scope == "batch" and selection.score != "all":
            scored = jax.lax.map(lambda part: signals(policy_loss(part), part, None), parts)
            parts = parts._replace(ref_loss=scored.ref_loss, ref_entropy=scored.ref_entropy)
            whole = jax.tree.map(_merge, scored)._replace(key=key)
            mask = _split(select(selection, whole, ratio), accumulation)
        grads, metrics = _sum_over(grad_of, (parts, jax.random.split(key, accumulation), mask))

    weight = metrics["selected"] + selection.floor * (metrics["tokens"] - metrics["selected"])
    weight = jnp.where(weight > 0, weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.tree.norm(grads)
    average = state.average
    if average is not None:
        average = optax.incremental_update(params, average, 1.0 - decay)
    return TrainState(state.step + 1, params, opt_state, average), metrics


def eval_step(params: Params, batch: Batch, *, apply: Apply, chunk_tokens: int) -> Metrics:
    """Sum of the losses (nats) over valid targets, and their number. No gradients."""
    loss, _ = losses.next_token_losses(apply, params, batch.tokens, chunk_tokens=chunk_tokens)
    return {"loss": masked_sum(loss, batch.valid), "tokens": _count(batch.valid)}


def _signals(
    loss: Float[Array, "B S"],
    ref_params: Params | None,
    batch: Batch,
    key: PRNGKeyArray | None,
    ref_apply: Apply,
    selection: Selection,
    chunk_tokens: int,
) -> Signals:
    """What the selection reads, computed or from the batch. No gradient to the reference."""
    ref_loss, ref_entropy = batch.ref_loss, batch.ref_entropy
    missing_loss = selection.needs_ref_loss and ref_loss is None
    missing_entropy = selection.needs_ref_entropy and ref_entropy is None
    if missing_loss or missing_entropy:
        if ref_params is None:
            raise InputError(
                f"select.score={selection.score} reads the reference, but there is neither a "
                "reference model nor cached scores: run the reference stage or score the corpus."
            )
        ref_loss, ref_entropy = jax.lax.stop_gradient(
            losses.next_token_losses(
                ref_apply,
                ref_params,
                batch.tokens,
                chunk_tokens=chunk_tokens,
                entropy=selection.needs_ref_entropy,
            )
        )
    if selection.needs_utility and batch.utility is None:
        raise InputError(
            f"select.score={selection.score} reads a utility, but the batch has none: "
            "set select.utility and run the score stage."
        )
    targets = batch.tokens[:, 1:]
    return Signals(loss, batch.valid, ref_loss, ref_entropy, key, targets, batch.utility)


def _metric_sums(
    s: Signals, mask: Bool[Array, "B S"], useful: Bool[Array, "B S"] | None
) -> Metrics:
    """Sums over all valid and over selected tokens; unselected is their difference."""
    out = {
        "tokens": _count(s.valid),
        "selected": _count(mask),
        "loss": masked_sum(s.loss, s.valid),
        "loss_selected": masked_sum(s.loss, mask),
    }
    if s.ref_loss is not None:
        out["ref_loss"] = masked_sum(s.ref_loss, s.valid)
        out["ref_loss_selected"] = masked_sum(s.ref_loss, mask)
    if useful is not None:
        out["useful"] = _count(useful & s.valid)
        out["selected_useful"] = _count(useful & mask)
    return jax.lax.stop_gradient(out)


def _count(mask: Bool[Array, "B S"]) -> Float[Array, ""]:
    return mask.sum(dtype=jnp.int32).astype(jnp.float32)


def _split(x: Array, n: int) -> Array:
    """[B, ...] -> [n, B/n, ...]. Row r goes to microbatch r % n, so a device keeps its own rows."""
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)


def _merge(x: Array) -> Array:
    """The inverse of `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _sum_over(fn, xs):
    """Sum of fn over the leading axis of xs, one element in memory at a time."""
    first, rest = (jax.tree.map(lambda x, i=i: x[i], xs) for i in (0, slice(1, None)))

    def add(total, x):
        return jax.tree.map(jnp.add, total, fn(*x)), None

    return jax.lax.scan(add, fn(*first), rest)[0]
