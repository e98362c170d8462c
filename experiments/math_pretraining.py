"""Does selecting tokens help, and is it the selection? SLM and its controls (Table 1, Figure 1).

    python -m experiments.math_pretraining [--scale=tiny] [--seeds=3] --out=runs/math_pretraining

From the same base: SLM; CLM; CLM for as many FLOPs as SLM spent in all (reference, scoring and
training); CLM on the corpus mixed with the reference's clean text; a random and the inverse
selection of as many tokens. Base and reference are shown too.
"""

import sys

import matplotlib.pyplot as plt

from experiments import results, study
from experiments.study import Study

PAPER = (
    "Table 1 and Figure 1: continued pretraining of a 1.1B and a 7B model on 15B tokens of "
    "OpenWebMath. SLM is 16.5 and 10.4 points better than CLM on average over nine tasks, and "
    "reaches CLM's accuracy 5 to 10 times faster."
)


def run(this: Study) -> None:
    seeds = range(this.seeds)
    configs = {(m, seed): c for seed in seeds for m, c in this.methods(seed).items()}
    runs = this.run(configs)
    fig, panels = plt.subplots(
        1, len(this.targets), figsize=(1.6 + 3.4 * len(this.targets), 3.4),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes, domain in zip(panels[0], this.targets, strict=True):
        results.draw_curves(axes, runs, domain)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    speed = [
        f"SLM reaches CLM's last loss on {domain} with "
        f"{results.said(results.speedup(runs, 'SLM', domain), digits=2)} times fewer tokens."
        for domain in this.targets
    ]
    text = [
        results.comparison(runs, [*this.targets, *this.corpus]), *speed, results.save(this, fig),
        f"Paper: {PAPER}",
    ]  # fmt: skip
    results.write(this, runs, results.rows(runs), "\n\n".join(text))


if __name__ == "__main__":
    sys.exit(study.main(run))
