"""Scores and validity in, a mask out: exactly round(ratio * n_valid) tokens are kept.

Ties go to the earlier position, padding is never kept, and NaN ranks below everything.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from rho1_jax.errors import InputError, require_known
from rho1_jax.slm import outside, scores
from rho1_jax.slm.signals import TOP, Signals, computed_by

SCOPES = ("batch", "microbatch", "shard", "sequence")
SET_OPERATIONS = ("intersection", "union")
SCHEDULES = ("linear", "cosine")


class Domain(NamedTuple):
    """A source of rows. share: of all rows, on average; ratio: its own, 0 for none."""

    name: str
    share: float
    ratio: float = 0.0


def mixture(weights: Mapping[str, float], own: Mapping[str, float]) -> tuple[Domain, ...]:
    """The domains of these weights, with what ratios of their own they have; none where there is
    but one and it has none."""
    for name in own:
        require_known("select.domain_ratios: the domain", name, weights)
    if len(weights) < 2 and not own:
        return ()
    total = sum(weights.values())
    return tuple(
        Domain(name, weight / total, float(own.get(name, 0.0))) for name, weight in weights.items()
    )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which tokens to keep.

    score: a name in `scores.SCORES`, or `package.module:function` (outside.py); "all" (causal
      language modeling: every valid token); "combined" (weighted sum of standardised scores);
      "intersection" or "union" (set operations on the masks that each part keeps at `ratio`; the
      realised share differs and is reported).
    ratio: share of the valid tokens to keep, in (0, 1].
    scope: the set among which tokens compete. "batch" is the paper's: the whole global batch;
      "microbatch" one accumulation step, all devices; "shard" one device's rows (or, where devices
      share rows, theirs); "sequence" one row. These are different methods. Scores that compare
      tokens (a median, a standardisation, repeats) compare those that compete.
    parts: for "combined" and the set operations, (score, weight) pairs; the latter ignore weights.
    n_shards: for scope "shard", over how many devices the batch dimension is spread.
    row_parts: over how many devices each of those rows is cut; it changes no selection.
    weight_range: e of `excess_weights`, in [0, 1): what each kept token weighs in the loss, between
      1 - e and 1 + e by its excess loss; 0: all weigh 1. With score "all", weights instead of a
      mask.
    weight_slope: b of it.
    distill_weight: of the divergence from the reference's prediction (losses.py, `top_divergence`)
      in the loss, summed over the kept tokens or, with distill_all, over all, and divided as the
      loss is; distill_top: of how many of its likeliest tokens that is made.
    domains: where the rows come from (`Batch.domain` counts them). The tokens of a domain with a
      ratio of its own compete among themselves, at that ratio all along; at 1 all are trained.
      Those of the others compete with each other as if there were no more. Each of these
      competitions is held in each set of the scope, and keeps its own k there: with scope
      "sequence", of each row the share of its domain. Scores that compare tokens compare those of
      one competition.
    unselected_weight: weight in the loss of the tokens that are not kept, in [0, 1); above 0
      nothing is dropped, and the backward pass costs what it costs without a selection.
    final_ratio: the ratio of the last of `steps` steps, to which it moves from `ratio` along a line
      or half a cosine wave (`schedule`); None: it stays.
    """

    score: str = "excess"
    ratio: float = 0.6
    scope: str = "batch"
    parts: tuple[tuple[str, float], ...] = ()
    n_shards: int = 1
    unselected_weight: float = 0.0
    final_ratio: float | None = None
    schedule: str = "linear"
    steps: int = 1
    row_parts: int = 1
    domains: tuple[Domain, ...] = ()
    weight_range: float = 0.0
    weight_slope: float = 1.0
    distill_weight: float = 0.0
    distill_top: int = 32
    distill_all: bool = False

    def __post_init__(self) -> None:
        composite = ("combined", *SET_OPERATIONS)
        _require_score("select.score", self.score, ("all", *scores.SCORES, *composite))
        require_known("select.scope", self.scope, SCOPES)
        require_known("select.schedule", self.schedule, SCHEDULES)
        for name, _ in self.parts:
            _require_score("select.parts", name, tuple(scores.SCORES))
        ratios = [("ratio", self.ratio), ("final_ratio", self.last_ratio)]
        ratios += [(f"domain_ratios of {d.name}", d.ratio) for d in self.domains if d.ratio]
        for key, ratio in ratios:
            if not 0.0 < ratio <= 1.0:
                raise InputError(
                    f"select.{key} is {ratio}, but it is the share of tokens to train on: "
                    "set it above 0 and at most 1 (1 is plain causal language modeling)."
                )
        if not 0.0 <= self.unselected_weight < 1.0:
            raise InputError(
                f"select.unselected_weight is {self.unselected_weight}, but it is the weight of a "
                "token that is not selected: set it to at least 0 and below 1."
            )
        if not 0.0 <= self.weight_range < 1.0 or not self.weight_slope > 0.0:
            raise InputError(
                f"select.weight_range is {self.weight_range} and select.weight_slope "
                f"{self.weight_slope}: set the first to at least 0 and below 1, the second above 0."
            )
        if self.score in composite and len(self.parts) < 2:
            raise InputError(
                f"select.score={self.score} combines scores, but select.parts names "
                f"{len(self.parts)}: name at least two, for instance reference and entropy."
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the scores that are computed."""
        if self.score == "all":
            return ()
        if self.score in ("combined", *SET_OPERATIONS):
            return tuple(dict.fromkeys(name for name, _ in self.parts))
        return (self.score,)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that are read (signals.py)."""
        weighed = {"loss", "ref_loss"} if self.weight_range else set[str]()
        taught = set(TOP) if self.distill_weight else set[str]()
        return frozenset(weighed | taught).union(*map(scores.needs, self.reads))

    @property
    def top(self) -> int:
        """How many of the reference's likeliest tokens are read; 0 without distillation."""
        return self.distill_top if self.distill_weight else 0

    @property
    def needs_ref_entropy(self) -> bool:
        return "ref_entropy" in self.needs

    @property
    def needs_reference(self) -> bool:
        return bool(computed_by("reference", self.needs))

    @property
    def needs_utility(self) -> bool:
        return "utility" in self.needs

    @property
    def own_ratios(self) -> dict[int, float]:
        """Number of a domain -> its own ratio, where it has one."""
        return {i: d.ratio for i, d in enumerate(self.domains) if d.ratio}

    @property
    def last_ratio(self) -> float:
        """The ratio at the end of training."""
        return self.ratio if self.final_ratio is None else self.final_ratio

    @property
    def trains_all(self) -> bool:
        """Whether at some step every token may carry loss, so that none can be left out."""
        everything = max(self.ratio, self.last_ratio) >= 1.0 or self.unselected_weight > 0.0
        everything |= self.distill_weight > 0.0 and self.distill_all
        return self.score == "all" or everything

    def ratio_at(self, step: Int32[Array, ""]) -> float | Float32[Array, ""]:
        """The ratio of step 0, ..., steps - 1."""
        if self.final_ratio is None:
            return self.ratio
        way = jnp.clip(step / max(self.steps - 1, 1), 0.0, 1.0).astype(jnp.float32)
        if self.schedule == "cosine":
            way = (1.0 - jnp.cos(jnp.pi * way)) / 2.0
        return self.ratio + (self.final_ratio - self.ratio) * way

    def weights(self, mask: Bool[Array, "B S"], signals: Signals) -> Float[Array, "B S"]:
        """What each token weighs in the loss: `unselected_weight` if it is not kept, padding 0."""
        valid = signals["valid"]
        kept: float | Array = 1.0
        if self.weight_range:
            excess = jax.lax.stop_gradient(signals["loss"] - signals["ref_loss"])
            kept = excess_weights(excess, valid, self.weight_slope, self.weight_range)
        return jnp.where(mask, kept, jnp.where(valid, self.unselected_weight, 0.0))


def excess_weights(
    excess: Float[Array, "B S"], valid: Bool[Array, "B S"], slope: float, reach: float
) -> Float[Array, "B S"]:
    """clip(2 sigmoid(slope (excess - mean of its row's valid tokens)), 1 - reach, 1 + reach).

    The form of ReMiT (arXiv 2602.03075), there with the loss of a fine-tuned model as the
    reference. What padding gets is arbitrary.
    """
    n = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = jnp.sum(excess, axis=1, keepdims=True, where=valid) / n
    return jnp.clip(2.0 * jax.nn.sigmoid(slope * (excess - mean)), 1.0 - reach, 1.0 + reach)


def _require_score(key: str, name: str, known: tuple[str, ...]) -> None:
    if outside.named(name):
        outside.load(name)
    else:
        require_known(key, name, known)


def select(
    selection: Selection, signals: Signals, ratio: float | Float32[Array, ""] | None = None
) -> Bool[Array, "B S"]:
    """The mask of tokens to train on, [B, S]. No gradient flows back into the signals.

    ratio: the ratio of this step; None: that at the end of training.
    """
    signals = jax.lax.stop_gradient({k: x for k, x in signals.items() if k not in TOP})
    valid = signals["valid"]
    if selection.score == "all":
        return valid
    ratio = selection.last_ratio if ratio is None else ratio
    groups = _n_groups(selection, valid.shape[0])
    if selection.own_ratios and "domain" not in signals:
        raise InputError(
            "select.domain_ratios gives domains ratios of their own, but the batch does not say "
            "which domain its rows are of: set Batch.domain."
        )
    grouped = jax.tree.map(lambda x: x.reshape(groups, -1, x.shape[-1]), signals)
    masks = jax.vmap(lambda competing: _best_of_each(selection, competing, ratio))(grouped)
    return masks.reshape(valid.shape)


def _best_of_each(
    selection: Selection, signals: Signals, ratio: float | Float32[Array, ""]
) -> Bool[Array, "b S"]:
    """The mask of one set of the scope: the best of each domain that competes for itself, and of
    all others together."""
    own, valid = selection.own_ratios, signals["valid"]
    if not own:
        return _best(selection, signals, ratio)
    others, mask = valid, jnp.zeros_like(valid)
    for number, own_ratio in own.items():
        among = valid & (signals["domain"] == number)
        others &= ~among
        competing = {**signals, "valid": among}
        mask |= among if own_ratio == 1.0 else _best(selection, competing, own_ratio)
    return mask | _best(selection, {**signals, "valid": others}, ratio)


def _best(
    selection: Selection, signals: Signals, ratio: float | Float32[Array, ""]
) -> Bool[Array, "b S"]:
    """The mask of one competition: every token of these rows against every other."""

    def keep(score: Float[Array, "b S"]) -> Bool[Array, "b S"]:
        valid = signals["valid"]
        return top_k_mask(score.reshape(-1), valid.reshape(-1), ratio).reshape(valid.shape)

    if selection.score == "combined":
        return keep(scores.combined(selection.parts, signals))
    masks = jnp.stack([keep(scores.score(name, signals)) for name in selection.reads])
    return masks.all(0) if selection.score == "intersection" else masks.any(0)


def require_keeps_some(
    selection: Selection, batch_size: int, seq_len: int, accumulation: int = 1
) -> None:
    """InputError if the ratio rounds to no token at all in every batch of [batch_size, seq_len]."""
    if selection.trains_all:
        return
    shards = accumulation * selection.n_shards
    groups = {"batch": 1, "microbatch": accumulation, "shard": shards, "sequence": batch_size}
    competing = batch_size * seq_len // groups[selection.scope]
    ratio = max(selection.ratio, selection.last_ratio, *selection.own_ratios.values())
    if np.round(np.float32(ratio) * np.float32(competing)) >= 1:
        return
    raise InputError(
        f"select.ratio={ratio} of the {competing} tokens that compete (select.scope="
        f"{selection.scope}) keeps none: set it above {0.5 / competing:.2g}, or use a wider scope."
    )


def top_k_mask(
    score: Float[Array, " N"], valid: Bool[Array, " N"], ratio: float | Float32[Array, ""]
) -> Bool[Array, " N"]:
    """True on exactly k = round(ratio * n_valid) tokens (halves to even, in float32).

    The k-th largest score is found bit by bit on integers that sort like the floats: 32 counting
    passes, no sort, and under sharding only scalar sums cross devices until the ties are ranked.
    """
    keys = jnp.where(valid, _sortable(score), jnp.uint32(0))
    n_valid = valid.sum(dtype=jnp.int32)
    k = jnp.minimum(jnp.round(ratio * n_valid.astype(jnp.float32)).astype(jnp.int32), n_valid)
    threshold = _kth_largest(keys, k)
    above = keys > threshold
    tied = keys == threshold
    room = k - above.sum(dtype=jnp.int32)
    return valid & (above | (tied & (jnp.cumsum(tied, dtype=jnp.int32) <= room)))


def _sortable(x: Float[Array, " N"]) -> UInt32[Array, " N"]:
    """Unsigned integers in the order of the floats; NaN as -inf, -0.0 as 0.0; none maps to 0."""
    x = x.astype(jnp.float32)
    x = jnp.where(jnp.isnan(x), -jnp.inf, jnp.where(x == 0.0, 0.0, x))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(0x80000000))


def _kth_largest(keys: UInt32[Array, " N"], k: Int32[Array, ""]) -> UInt32[Array, ""]:
    """The largest t with at least k keys >= t: the k-th largest key (all ones when k is 0)."""

    def set_bit(i, t):
        candidate = t | (jnp.uint32(1) << jnp.uint32(31 - i))
        return jnp.where(jnp.sum(keys >= candidate, dtype=jnp.int32) >= k, candidate, t)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.uint32(0))


def _n_groups(selection: Selection, batch_size: int) -> int:
    """How many independent competitions these rows hold; accumulation is the step's business."""
    if selection.scope == "sequence":
        return batch_size
    return selection.n_shards if selection.scope == "shard" else 1
