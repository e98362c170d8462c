"""Should the ratio change over time? From many tokens to few, and from few to many.

    python -m experiments.schedules [--scale=tiny] [--seeds=3] --out=runs/schedules

Each schedule selects 0.6 of all tokens in the mean over the steps, as SLM does.
"""

import sys

from experiments.lab import study
from experiments.lab.study import Study
from experiments.lab.variants import compare

VARIANTS = {
    f"{schedule}, {first} to {last}": {
        "select.ratio": first, "select.final_ratio": last, "select.schedule": schedule
    }
    for schedule, first, last in (
        ("linear", 0.9, 0.3), ("cosine", 0.9, 0.3), ("linear", 0.3, 0.9)
    )
}  # fmt: skip


def run(this: Study) -> None:
    compare(
        this,
        VARIANTS,
        "The backward pass is sized by the largest ratio of a schedule, so that a moving "
        "ratio costs what its larger end costs. Shares are means over the logged steps. Schedules "
        "are not in the paper.",
    )


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
