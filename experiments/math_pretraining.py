"""Does selecting tokens help, and is it the selection? SLM and its controls (Table 1, Figure 1).

    python -m experiments.math_pretraining [--scale=tiny] [--seeds=3] --out=runs/math_pretraining

From the same base: SLM; CLM; CLM for as many FLOPs as SLM spent in all (reference, scoring and
training); CLM on the corpus mixed with the reference's clean text; a random and the inverse
selection of as many tokens. Base and reference are shown too.
"""

import math
import sys

from experiments.lab import results, study
from experiments.lab.study import Study


def run(this: Study) -> None:
    runs = this.run({(m, s): c for s in range(this.seeds) for m, c in this.methods(s).items()})
    speed = ", ".join(_speed(runs, domain) for domain in this.targets)
    text = [
        results.comparison(runs, [*this.targets, *this.corpus]),
        results.save(this, results.figure_of_curves(runs, this.targets)),
        results.beside_paper(
            ("SLM against CLM at matched tokens (paper: few-shot accuracy on GSM8K and MATH; here: "
             "held-out loss in nats per token)",
             "over 16 % better on average, 1.1B and 7B, 15B tokens",
             results.differences(runs, "SLM", this.targets)),
            ("how many times fewer tokens reach CLM's last result", "5 to 10", speed),
        ),
    ]  # fmt: skip
    results.write(this, runs, results.rows(runs), "\n\n".join(text))


def _speed(runs: results.Runs, domain: str) -> str:
    found = results.speedup(runs, "SLM", domain)
    if math.isinf(found.high):
        return f"{domain}: no number, CLM improves too little"
    return f"{domain} {results.said(found, digits=2)}"


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
