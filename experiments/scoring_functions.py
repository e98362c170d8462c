"""What if tokens are scored in another way? Nine variants from the same base.

    python -m experiments.scoring_functions [--scale=tiny] [--seeds=3] --out=runs/scoring_functions

SLM's excess loss against the policy's loss alone, the reference's entropy, both combined, nearness
to the median loss, references that follow the policy, and soft weights. The two that follow are
moving averages of the policy's parameters: `history` starts as the policy itself, so that the
excess loss is what the policy has lost since (`forgotten`) and its negative what it has gained
(`progress`); `self-evolving` starts as the trained reference. They cost a forward pass in every
step and cannot be cached. With an
`unselected_weight` no token is dropped: it costs as much as CLM, plus scoring.
"""

import sys

from experiments.lab import study
from experiments.lab.study import Study
from experiments.lab.variants import compare

MIXED = (("excess", 1.0), ("entropy", 0.5))
HORIZON = 0.05  # a moving reference looks back over this share of the training


def variants(steps: int) -> dict[str, dict]:
    """name -> changes to SLM."""
    moving = {"select.ref_ema_decay": 1.0 - 1.0 / max(2.0, HORIZON * steps)}
    return {
        "loss": {"select.score": "loss"},
        "entropy": {"select.score": "entropy"},
        "excess + entropy / 2": {"select.score": "combined", "select.parts": MIXED},
        "middle perplexity": {"select.score": "middle"},
        "history: forgotten": moving,
        "history: progress": {**moving, "select.score": "inverse"},
        "self-evolving reference": {**moving, "select.ref_ema_init": "reference"},
        "SLM, unselected_weight 0.1": {"select.unselected_weight": 0.1},
        "SLM, unselected_weight 0.5": {"select.unselected_weight": 0.5},
    }


def run(this: Study) -> None:
    compare(
        this,
        variants(this.config(0).train.steps),
        "Black squares: SLM (excess loss) and the controls. The paper uses excess loss "
        "(section 2.2), and reference loss and entropy in self-reference (section 3.4); the others "
        "are not in the paper.",
    )


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
