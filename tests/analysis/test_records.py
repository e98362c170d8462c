"""What entered the loss, in words, for every kind of selection."""

import pytest

from rho1_jax.analysis import records
from rho1_jax.slm.scores import SCORES

BATCH = "of each global batch, "
EXCESS = "the 60% of tokens with the highest excess loss"
PARTS = [["excess", 1.0], ["entropy", 0.5]]


def said(**changes):
    plain = {"score": "excess", "ratio": 0.6, "scope": "batch", "final_ratio": 0.0, "parts": []}
    return records.entered_the_loss(plain | changes)


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({}, f"{BATCH}{EXCESS} entered the loss"),
        ({"final_ratio": None}, f"{BATCH}{EXCESS} entered the loss"),
        ({"final_ratio": 0.6}, f"{BATCH}{EXCESS} entered the loss"),
        ({"score": "all"}, "every token entered the loss"),
        ({"score": "all", "unselected_weight": 0.5}, "every token entered the loss"),
        ({"ratio": 1.0}, "every token entered the loss"),
        (
            {"ratio": 0.625},
            f"{BATCH}the 62.5% of tokens with the highest excess loss entered the loss",
        ),
        ({"scope": "sequence"}, f"of each sequence, {EXCESS} entered the loss"),
        ({"scope": "shard"}, f"of each device's part of the batch, {EXCESS} entered the loss"),
        ({"scope": "epoch"}, f"of each epoch, {EXCESS} entered the loss"),
        ({"score": "entropy"}, "60% of tokens with the lowest reference entropy entered the loss"),
        ({"score": "inverse"}, "60% of tokens with the lowest excess loss entered the loss"),
        ({"score": "middle"}, "with the lowest distance to the median loss entered the loss"),
        ({"score": "random"}, f"{BATCH}a random 60% of the tokens entered the loss"),
        (
            {"score": "my.module:new"},
            "the 60% of tokens with the highest my.module:new entered the loss",
        ),
        (
            {"score": "utility", "utility": "tags:number,latex"},
            "the 60% of tokens with the highest utility (tags:number,latex) entered the loss",
        ),
        (
            {"unselected_weight": 0.5},
            "all tokens entered the loss, the unselected with weight 0.5; selected were, of each "
            f"global batch, {EXCESS}",
        ),
        (
            {"ratio": 0.9, "final_ratio": 0.3, "schedule": "cosine"},
            f"{BATCH}the tokens with the highest excess loss entered the loss, from 90% at the "
            "start to 30% at the end (cosine schedule)",
        ),
        (
            {"ratio": 0.5, "final_ratio": 1.0, "score": "random"},
            f"{BATCH}random tokens entered the loss, from 50% at the start to 100% at the end "
            "(linear schedule)",
        ),
        (
            {"ref_ema_decay": 0.98, "ref_ema_init": "reference"},
            f"{BATCH}{EXCESS} entered the loss, scored against a moving average of the policy "
            "(decay 0.98, initialised from the reference)",
        ),
        (
            {"ref_ema_decay": 0.98, "unselected_weight": 0.1},
            f"weight 0.1; selected were, {BATCH}{EXCESS}, scored against a moving average of the "
            "policy (decay 0.98, initialised from the policy)",
        ),
        (
            {"score": "loss", "ref_ema_decay": 0.98},
            f"{BATCH}the 60% of tokens with the highest loss entered the loss",
        ),
        (
            {"domain_ratios": [["books", 1.0], ["web", 0.4]]},
            f"{EXCESS} entered the loss; of books every token; of web 40%, competing for itself",
        ),
        ({"ratio": 1.0, "domain_ratios": [["web", 1]]}, "every token entered the loss"),
        ({"ratio": 1.0, "domain_ratios": [["web", 0.4]]}, "; of web 40%, competing for itself"),
        (
            {"score": "all", "weight_range": 0.25, "weight_slope": 2.0},
            "every token entered the loss, weighing 0.75 to 1.25 by the excess loss over the mean "
            "of its row (slope 2)",
        ),
        (
            {"distill_weight": 0.5, "distill_on": "all"},
            "; beside it, with weight 0.5, the divergence from the reference on all tokens",
        ),
        ({"ref_ema_decay": 1.0}, f"{BATCH}{EXCESS} entered the loss"),
        (
            {"score": "union", "parts": PARTS, "ratio": 0.8},
            f"{BATCH}the union of the 80% of tokens with the highest excess loss and the 80% of "
            "tokens with the lowest reference entropy entered the loss",
        ),
        (
            {"score": "combined", "parts": [*PARTS, ["utility", 1]], "utility": "relevance"},
            f"{BATCH}the 60% of tokens with the highest weighted sum of excess loss (1), negative "
            "reference entropy (0.5) and utility (relevance) (1), standardised, entered the loss",
        ),
        (
            {"score": "combined", "parts": PARTS, "ref_ema_decay": 0.9},
            "standardised, entered the loss, scored against a moving average of the policy "
            "(decay 0.9, initialised from the policy)",
        ),
    ],
)
def test_what_entered_the_loss(changes, clause):
    found = said(**changes)
    assert found.endswith(clause)
    assert not found.endswith(".")


def test_every_score_of_the_method_has_words():
    assert set(SCORES) == {*records.SCORES, "random", "utility"}
