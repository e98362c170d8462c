"""The paper's future work: utility beyond loss (section 5).

    python -m experiments.utility_scores [--scale=tiny] [--seeds=3] --out=runs/utility_scores

Semantic relevance (likeness of hidden states to those of the clean text), contextual diversity (no
token whose last four came before in the batch) and domain-specific features (numbers and LaTeX),
alone where that makes sense, and added to the excess loss, both standardised. At equal tokens; what
each costs in all stands in the table, and CLM for as many FLOPs as SLM is the control for that.
"""

import sys

from experiments.lab import study
from experiments.lab.study import Study
from experiments.lab.variants import compare


def _with_excess(score: str, **more: str) -> dict:
    parts = (("excess", 1.0), (score, 0.5))
    return {"select.score": "combined", "select.parts": parts, **more}


RELEVANCE = {"select.utility": "relevance"}
TAGS = {"select.utility": "tags:number,latex"}
VARIANTS = {
    "relevance": {"select.score": "utility", **RELEVANCE},
    "excess + relevance / 2": _with_excess("utility", **RELEVANCE),
    "excess + diversity / 2": _with_excess("diversity"),
    "excess + numbers / 2": _with_excess("utility", **TAGS),
}


def run(this: Study) -> None:
    compare(
        this,
        VARIANTS,
        "Relevance reads the reference's hidden states: one more forward pass over the corpus "
        "beside the one for its losses. Diversity and tags cost no model's pass.",
    )


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
