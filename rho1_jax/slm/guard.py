"""Steps that change nothing: not finite, a spike, or without a token to learn from."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

WINDOW = 64  # gradient norms whose median is what is usual


def no_norms() -> Float[Array, " W"]:
    """The recent gradient norms before the first step, the latest last; NaN is none."""
    return jnp.full(WINDOW, jnp.nan, jnp.float32)


def kept(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new`, or `old` bit for bit."""
    # On TPUs a select of each array is a part of the update that made it and takes no memory; a
    # `cond` would hold new and old, and one around the update rounds it another way.
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def unless_bad(
    old: Any,
    new: Any,
    metrics: dict[str, Float[Array, ""]],
    weight: Float[Array, ""],
    spike: float,
) -> tuple[Any, dict[str, Float[Array, ""]]]:
    """(`new`, or `old` bit for bit where the step was bad or empty; the metrics that say which).

    old, new: TrainStates (step.py). `step` counts on in both cases, so that the data goes on; the
      optimizer's own counts do not, nor what they schedule.
    weight: of all tokens in the loss together; 0: the step is empty.
    spike: the step is also bad if its gradient norm is more than that many times the median of the
      last WINDOW finite ones, once there are so many; they hold the norms of such steps too, so
      that a lasting change is accepted in the end. 0: never.
    """
    norm = metrics["grad_norm"]
    losses = jnp.stack([metrics[name] for name in ("loss", "ref_loss") if name in metrics])
    finite = jnp.isfinite(norm) & jnp.isfinite(losses).all()
    calm, norms = jnp.bool(True), old.norms
    if norms is not None:
        calm = ~(norm > spike * jnp.median(norms))  # NaN while some are missing
        known = finite & (weight > 0)
        norms = jnp.where(known, jnp.append(norms[1:], norm), norms)
    good, bad = finite & calm & (weight > 0), ~(finite & calm)
    said = {"bad": bad, "empty": ~bad & ~(weight > 0)}
    return (
        kept(good, new, old)._replace(step=old.step + 1, norms=norms),
        metrics | {name: flag.astype(jnp.float32) for name, flag in said.items()},
    )
