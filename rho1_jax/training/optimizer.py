"""Optimizers and schedules, optax's own, by the names that a config gives them: our choice all,
since the paper names none of them.

`lr` and `weight_decay` mean the same for each: about the size of an entry's update, and the share
of it that decays. So Adafactor comes without its relative step size, and Muon scaled to AdamW's RMS
(Liu et al., arXiv 2502.16982).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax import contrib

SCHEDULES = ("cosine", "linear", "constant", "wsd")
# What Muon makes orthogonal, layer by layer; the rest goes to AdamW.
HIDDEN_MATRICES = r"^layers/(q|k|v|o|gate|up|down)$"
_ADAMW_RMS = 0.2  # of an update, as Muon's authors measured it


def schedule(
    name: str, lr: float, warmup_steps: int, steps: int, final_share: float, decay_steps: int = 0
) -> optax.Schedule:
    """Linear warmup from 0 to `lr`, then one of SCHEDULES.

    cosine, linear: down to `final_share` * lr at the last step. wsd (warmup, stable, decay): `lr`,
    and over the last `decay_steps` linear down to there. constant: `lr`.
    """
    final, after = final_share * lr, max(steps - warmup_steps, 1)
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, lr, warmup_steps, warmup_steps + after, end_value=final
        )
    if name == "linear":
        rest = optax.linear_schedule(lr, final, after)
    elif name == "wsd":
        rest = optax.linear_schedule(lr, final, decay_steps, after - decay_steps)
    else:
        rest = optax.constant_schedule(lr)
    warmup = optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.join_schedules([warmup, rest], [warmup_steps])


def of(
    name: str,
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip: float,
    moments_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Clip by global norm, then one of OPTIMIZERS; norms and biases (rank 1 per layer) are not
    decayed.

    b1, b2: decay of the first and the second moment. moments_dtype: of the first; the second, whose
      steps of 1 - b2 would be lost in bfloat16, stays float32.
    """
    dtype = None if moments_dtype == "float32" else moments_dtype  # None: as the parameters
    inner = OPTIMIZERS[name](learning_rate, b1, b2, weight_decay, dtype)
    return optax.chain(optax.clip_by_global_norm(clip), inner)


def _adamw(learning_rate, b1, b2, weight_decay, dtype) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_decayed, mu_dtype=dtype
    )


def _adafactor(learning_rate, b1, _b2, weight_decay, dtype) -> optax.GradientTransformation:
    """The second moment of each layer's matrix by its rows and columns, decaying as 1 - t^-0.8; a
    first moment only where b1 is not 0."""
    return optax.adafactor(
        learning_rate,
        multiply_by_parameter_scale=False,
        momentum=b1 or None,
        dtype_momentum=dtype or "float32",
        weight_decay_rate=lambda count: weight_decay * learning_rate(count),  # as AdamW's
        weight_decay_mask=_decayed,
    )


def _muon(learning_rate, b1, b2, weight_decay, dtype) -> optax.GradientTransformation:
    """Muon for the hidden matrices, each layer's for itself; AdamW for embedding, head, norms and
    biases."""
    orthogonal = contrib.muon(
        learning_rate,
        beta=b1,
        weight_decay=weight_decay,
        mu_dtype=dtype,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: contrib.MuonDimensionNumbers(1, 2), params
        ),
        consistent_rms=_ADAMW_RMS,
    )
    rest = _adamw(learning_rate, b1, b2, weight_decay, dtype)
    return optax.partition({"muon": orthogonal, "adamw": rest}, _muon_or_adamw)


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw, "adafactor": _adafactor, "muon": _muon,
}  # fmt: skip


def _muon_or_adamw(params: Any) -> Any:
    def label(path, _) -> str:
        name = "/".join(key.key for key in path)
        return "muon" if re.search(HIDDEN_MATRICES, name) else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("norm", "bias")), params
    )
