"""The training step of Selective Language Modeling (paper, section 2.2).

Read `train_step` and `select` (selection.py): that is the whole method. Everything is a pure
function of arrays; the model comes in as a function, the reference as an argument of its own that
is never differentiated, updated or saved.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from rho1_jax.errors import InputError
from rho1_jax.slm import guard, head, losses, rows
from rho1_jax.slm.losses import Apply, Params, masked_sum
from rho1_jax.slm.selection import Selection, select
from rho1_jax.slm.signals import CACHED, TOP, Signals, computed_by, of_reference

Metrics = dict[str, Float[Array, ""]]


class Batch(NamedTuple):
    """Packed rows, and the signals that were computed of them beforehand (signals.py).

    With all that the selection reads in `cached`, the reference pass is skipped. `useful` is the
    truth about each target where a corpus knows it; it only feeds metrics. `domain` says which of
    `Selection.domains` each row is of.
    """

    tokens: Int[Array, "B S+1"]
    valid: Bool[Array, "B S"]
    cached: dict[str, Float[Array, "B S"]] = {}  # noqa: RUF012 (nothing is ever put into it)
    useful: Bool[Array, "B S"] | None = None
    domain: Int32[Array, " B"] | None = None


class TrainState(NamedTuple):
    """step counts all steps, also those that changed nothing: it is the position in the data.

    ref_ema: a moving average of `params`, kept only where it serves as the reference.
    norms: recent gradient norms, kept only where they tell spikes (guard.py).
    """

    step: Int32[Array, ""]
    params: Params
    opt_state: Any
    ref_ema: Params | None = None
    norms: Float[Array, " W"] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """What of a step is fixed when it is compiled.

    apply, ref_apply: the model, as a function, of the policy and of the reference.
    chunk_tokens: the most tokens whose logits exist at once (head.py).
    accumulation: the rows are spread over that many microbatches, so B must divide by it. Under
      scope "batch" all must be scored before any can be masked: one more forward pass.
    ref_ema_decay: for a state with a `ref_ema`: ref_ema <- decay * ref_ema + (1 - decay) * params.
    spike: for a state with `norms`: skip a step whose gradient norm is above that many medians.
    """

    apply: Apply
    ref_apply: Apply
    tx: optax.GradientTransformation
    selection: Selection
    chunk_tokens: int
    accumulation: int = 1
    ref_ema_decay: float = 1.0
    spike: float = 0.0


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    ref_ema: Params | None = None,
    *,
    spike: float = 0.0,
) -> TrainState:
    """The state before the first step; `spike` as in Method."""
    norms = guard.no_norms() if spike else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ref_ema, norms)


def train_step(
    state: TrainState,
    ref_params: Params | None,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    method: Method,
) -> tuple[TrainState, Metrics]:
    """One SLM update. Pure: (state, reference, batch, key) -> (state, metrics).

    The loss is the sum over selected tokens divided by their number, both taken over all
    microbatches and devices (a mean of means would favour microbatches with few selected tokens);
    where tokens have weights, the weighted sum divided by the sum of the weights.

    A step that is not finite, or keeps no token, changes nothing but `state.step` (guard.py).
    Metrics are sums and counts over the batch, the gradient's norm, and whether the step was "bad"
    or "empty" (0 or 1). `key` seeds the random control; it is folded with the step.

    A state with a `ref_ema` takes that as its reference, not `ref_params`: a different method, in
    which the reference follows the policy.
    """
    ref_params = ref_params if state.ref_ema is None else state.ref_ema
    grads, metrics, weight = _gradient(state, ref_params, batch, key, method)
    metrics["grad_norm"] = optax.tree.norm(grads)
    updates, opt_state = method.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state._replace(params=params, opt_state=opt_state)
    new, metrics = guard.unless_bad(state, new, metrics, weight, method.spike)
    if state.ref_ema is not None:
        # After the guard, or the parameters would be computed and rounded a second time for it.
        moved = optax.incremental_update(new.params, state.ref_ema, 1.0 - method.ref_ema_decay)
        changed = metrics["bad"] + metrics["empty"] == 0
        new = new._replace(ref_ema=guard.kept(changed, moved, state.ref_ema))
    return new, metrics


def eval_step(params: Params, batch: Batch, *, apply: Apply, chunk_tokens: int) -> Metrics:
    """Sum of the losses (nats) over valid targets, and their number. No gradients."""
    loss, _ = losses.next_token_losses(apply, params, batch.tokens, chunk_tokens=chunk_tokens)
    return {"loss": masked_sum(loss, batch.valid), "tokens": _count(batch.valid)}


def _gradient(state: TrainState, ref_params, batch: Batch, key, method: Method):
    """(gradient, metrics, weight) of the loss: a weighted mean over all microbatches together."""
    selection, n = method.selection, method.accumulation
    key = jax.random.fold_in(key, state.step)
    ratio = selection.ratio_at(state.step)

    def grad_of(part: Batch, key: PRNGKeyArray, mask: Bool[Array, "b S"] | None):
        return _summed_gradient(state.params, ref_params, part, key, mask, ratio, method)

    if n == 1:
        grads, metrics = grad_of(batch, key, None)
    else:
        parts, mask = jax.tree.map(lambda x: _split(x, n), batch), None
        if selection.scope == "batch" and selection.score != "all":
            parts, mask = _selected_ahead(state.params, ref_params, parts, key, ratio, method)
        grads, metrics = _sum_over(grad_of, (parts, jax.random.split(key, n), mask))

    if selection.weight_range:
        weight = metrics.pop("weight")
    else:
        unselected = metrics["tokens"] - metrics["selected"]
        weight = metrics["selected"] + selection.unselected_weight * unselected
    divisor = jnp.where(weight > 0, weight, 1.0)
    return jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads), metrics, weight


def _summed_gradient(params: Params, ref_params, part: Batch, key, mask, ratio, method: Method):
    """(gradient, metrics) of the loss *summed* over the selected tokens of one microbatch.

    mask: which they are, where that is known already.
    """
    inputs, targets = part.tokens[:, :-1], part.tokens[:, 1:]
    selection, chunk_tokens = method.selection, method.chunk_tokens
    capacity = rows.capacity(selection, *targets.shape, accumulated=method.accumulation > 1)

    def loss_fn(params: Params):
        hidden, lm_head = method.apply(params, inputs)
        loss, logits = head.token_losses(hidden, lm_head, targets, chunk_tokens=chunk_tokens)
        signals = _signals(loss, ref_params, part, method)
        chosen = select(selection, _drawn(signals, key, method), ratio) if mask is None else mask
        weight = selection.weights(chosen, signals)
        total = head.selected_sum(
            hidden, lm_head, targets, weight, loss, logits, capacity, chunk_tokens
        )
        if selection.distill_weight:
            kl = losses.top_divergence(
                hidden, lm_head, *(signals[name] for name in TOP), chunk_tokens=chunk_tokens
            )
            taught = part.valid if selection.distill_all else chosen
            total += selection.distill_weight * masked_sum(kl, taught)
        metrics = _metric_sums(signals, chosen, part.useful)
        metrics |= _domain_counts(selection, signals, chosen)
        return total, metrics | ({"weight": weight.sum()} if selection.weight_range else {})

    return jax.grad(loss_fn, has_aux=True)(params)


def _selected_ahead(params: Params, ref_params, parts: Batch, key, ratio, method: Method):
    """The microbatches [n, b, ...] with their reference signals, and the mask that tokens of all of
    them competed for: a forward pass of each."""

    def signals_of(part: Batch) -> Signals:
        loss, _ = losses.next_token_losses(
            method.apply, params, part.tokens, chunk_tokens=method.chunk_tokens
        )
        return _signals(loss, ref_params, part, method)

    scored = jax.lax.map(signals_of, parts)
    whole = _drawn(jax.tree.map(_merge, scored), key, method)
    mask = _split(select(method.selection, whole, ratio), method.accumulation)
    known = {name: scored[name] for name in CACHED if name in scored}
    return parts._replace(cached={**parts.cached, **known}), mask


def _signals(loss: Float[Array, "b S"], ref_params, batch: Batch, method: Method) -> Signals:
    """What the selection reads, computed or from the batch. No gradient to the reference."""
    selection = method.selection
    known = {"loss": loss, "valid": batch.valid, "targets": batch.tokens[:, 1:], **batch.cached}
    if batch.domain is not None:
        known["domain"] = batch.domain[:, None]
    if computed_by("reference", selection.needs - known.keys()):
        if ref_params is None:
            raise InputError(
                f"select.score={selection.score} reads the reference, but there is neither a "
                "reference model nor cached scores: run the reference stage or score the corpus."
            )
        known |= jax.lax.stop_gradient(
            of_reference(
                method.ref_apply,
                ref_params,
                batch.tokens,
                chunk_tokens=method.chunk_tokens,
                names=selection.needs,
                top=selection.top,
            )
        )
    if missing := computed_by("beforehand", selection.needs - known.keys()):
        name = min(missing)
        raise InputError(
            f"select.score={selection.score} reads a {name}, but the batch has none: "
            f"set select.{name} and run the score stage."
        )
    return known


def _drawn(signals: Signals, key: PRNGKeyArray, method: Method) -> Signals:
    """The signals with the draw of this step, if the selection reads one."""
    if "noise" not in method.selection.needs:
        return signals
    return {**signals, "noise": jax.random.uniform(key, signals["valid"].shape)}


def _metric_sums(
    signals: Signals, mask: Bool[Array, "B S"], useful: Bool[Array, "B S"] | None
) -> Metrics:
    """Sums over all valid and over selected tokens; unselected is their difference."""
    valid = signals["valid"]
    out = {"tokens": _count(valid), "selected": _count(mask)}
    for name in ("loss", "ref_loss"):
        if name in signals:
            out[name] = masked_sum(signals[name], valid)
            out[f"{name}_selected"] = masked_sum(signals[name], mask)
    if useful is not None:
        out["useful"] = _count(useful & valid)
        out["selected_useful"] = _count(useful & mask)
    return jax.lax.stop_gradient(out)


def _domain_counts(selection: Selection, signals: Signals, mask: Bool[Array, "B S"]) -> Metrics:
    """Valid and selected tokens of each domain that the batch tells apart."""
    out = {}
    for number, domain in enumerate(selection.domains if "domain" in signals else ()):
        here = signals["domain"] == number
        out[f"tokens/{domain.name}"] = _count(signals["valid"] & here)
        out[f"selected/{domain.name}"] = _count(mask & here)
    return out


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
