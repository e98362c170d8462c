"""Scores and validity in, a mask out: exactly round(ratio * n_valid) tokens are kept.

Ties go to the earlier position, padding is never kept, and NaN ranks below everything.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from rho1_jax.errors import InputError, require_known
from rho1_jax.slm import scores
from rho1_jax.slm.scores import Signals

SCOPES = ("batch", "microbatch", "shard", "sequence")
SET_OPERATIONS = ("intersection", "union")
SCHEDULES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which tokens to keep.

    score: a name in `scores.SCORES`; "all" (causal language modeling: every valid token);
      "combined" (weighted sum of standardised scores); "intersection" or "union" (set operations on
      the masks that each part keeps at `ratio`; the realised share differs and is reported).
    ratio: share of the valid tokens to keep, in (0, 1].
    scope: the set among which tokens compete. "batch" is the paper's: the whole global batch;
      "microbatch" one accumulation step, all devices; "shard" one device's rows (or, where devices
      share rows, theirs); "sequence" one row. These are different methods.
    parts: for "combined" and the set operations, (score, weight) pairs; the latter ignore weights.
    n_shards: for scope "shard", over how many devices the batch dimension is spread.
    row_parts: over how many devices each of those rows is cut; it changes no selection.
    floor: weight in the loss of the tokens that are not kept, in [0, 1); above 0 nothing is
      dropped, and the backward pass costs what it costs without a selection.
    final_ratio: the ratio of the last of `steps` steps, to which it moves from `ratio` along a line
      or half a cosine wave (`schedule`); None: it stays.
    """

    score: str = "excess"
    ratio: float = 0.6
    scope: str = "batch"
    parts: tuple[tuple[str, float], ...] = ()
    n_shards: int = 1
    floor: float = 0.0
    final_ratio: float | None = None
    schedule: str = "linear"
    steps: int = 1
    row_parts: int = 1

    def __post_init__(self) -> None:
        composite = ("combined", *SET_OPERATIONS)
        require_known("select.score", self.score, ("all", *scores.SCORES, *composite))
        require_known("select.scope", self.scope, SCOPES)
        require_known("select.schedule", self.schedule, SCHEDULES)
        for name, _ in self.parts:
            require_known("select.parts", name, tuple(scores.SCORES))
        for key, ratio in (("ratio", self.ratio), ("final_ratio", self.last_ratio)):
            if not 0.0 < ratio <= 1.0:
                raise InputError(
                    f"select.{key} is {ratio}, but it is the share of tokens to train on: "
                    "set it above 0 and at most 1 (1 is plain causal language modeling)."
                )
        if not 0.0 <= self.floor < 1.0:
            raise InputError(
                f"select.floor is {self.floor}, but it is the weight of a token that is not "
                "selected: set it to at least 0 and below 1."
            )
        if self.score in composite and len(self.parts) < 2:
            raise InputError(
                f"select.score={self.score} combines scores, but select.parts names "
                f"{len(self.parts)}: name at least two, for instance reference and entropy."
            )

    @property
    def reads(self) -> frozenset[str]:
        """Names of the scores that are computed."""
        if self.score in ("combined", *SET_OPERATIONS):
            return frozenset(name for name, _ in self.parts)
        return frozenset({self.score})

    @property
    def needs_ref_loss(self) -> bool:
        return bool(self.reads & scores.NEEDS_REF_LOSS)

    @property
    def needs_ref_entropy(self) -> bool:
        return bool(self.reads & scores.NEEDS_REF_ENTROPY)

    @property
    def needs_reference(self) -> bool:
        return self.needs_ref_loss or self.needs_ref_entropy

    @property
    def needs_utility(self) -> bool:
        return bool(self.reads & scores.NEEDS_UTILITY)

    @property
    def last_ratio(self) -> float:
        """The ratio at the end of training."""
        return self.ratio if self.final_ratio is None else self.final_ratio

    @property
    def trains_all(self) -> bool:
        """Whether at some step every token may carry loss, so that none can be left out."""
        everything = max(self.ratio, self.last_ratio) >= 1.0 or self.floor > 0.0
        return self.score == "all" or everything

    def ratio_at(self, step: Int32[Array, ""]) -> float | Float32[Array, ""]:
        """The ratio of step 0, ..., steps - 1."""
        if self.final_ratio is None:
            return self.ratio
        way = jnp.clip(step / max(self.steps - 1, 1), 0.0, 1.0).astype(jnp.float32)
        if self.schedule == "cosine":
            way = (1.0 - jnp.cos(jnp.pi * way)) / 2.0
        return self.ratio + (self.final_ratio - self.ratio) * way

    def weights(self, mask: Bool[Array, "B S"], valid: Bool[Array, "B S"]) -> Float[Array, "B S"]:
        """What each token weighs in the loss: 1 if it is kept, `floor` if not, 0 on padding."""
        return jnp.where(mask, 1.0, jnp.where(valid, self.floor, 0.0))


def select(
    selection: Selection, signals: Signals, ratio: float | Float32[Array, ""] | None = None
) -> Bool[Array, "B S"]:
    """The mask of tokens to train on, [B, S]. No gradient flows back into the signals.

    ratio: the ratio of this step; None: that at the end of training.
    """
    signals = jax.lax.stop_gradient(signals)
    ratio = selection.last_ratio if ratio is None else ratio
    if selection.score == "all":
        return signals.valid

    def keep(score: Float[Array, "B S"]) -> Bool[Array, "B S"]:
        groups = _n_groups(selection, score.shape[0])
        grouped = score.reshape(groups, -1), signals.valid.reshape(groups, -1)
        return jax.vmap(lambda s, v: top_k_mask(s, v, ratio))(*grouped).reshape(score.shape)

    if selection.score == "combined":
        return keep(scores.combined(signals, dict(selection.parts)))
    if selection.score not in SET_OPERATIONS:
        return keep(scores.SCORES[selection.score](signals))
    masks = jnp.stack([keep(scores.SCORES[name](signals)) for name, _ in selection.parts])
    return masks.all(0) if selection.score == "intersection" else masks.any(0)


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
