"""AdamW under warmup and cosine decay, with clipping: our choice, since the paper names none of
them."""

from typing import Any

import jax
import optax


def schedule(lr: float, warmup_steps: int, steps: int, final_share: float) -> optax.Schedule:
    """Linear warmup from 0 to `lr`, then cosine down to `final_share` * lr at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0, lr, warmup_steps, max(steps, warmup_steps + 1), end_value=final_share * lr
    )


def adamw(
    learning_rate: optax.Schedule, *, b1: float, b2: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; norms and biases (rank 1 per layer) are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_decayed),
    )


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("norm", "bias")), params
    )
