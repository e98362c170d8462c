"""How many tokens to select? Loss on the target against the ratio (Figure 9).

    python -m experiments.select_ratio [--scale=tiny] [--seeds=3] --out=runs/select_ratio

SLM at each ratio of the sweep `select_ratio` in configs/math.py, all of them from the same base,
reference and scores; at ratio 1 it is CLM. The controls select 60%, or all of another mixture.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from configs import math as math_config
from experiments.lab import results, study
from experiments.lab.results import BASELINE, COLORS, Runs
from experiments.lab.study import Study

RATIOS = [changes["select.ratio"] for _, changes in math_config.sweep("select_ratio")]


def run(this: Study) -> None:
    configs = {}
    for seed in range(this.seeds):
        for ratio in RATIOS[:-1]:
            configs[_name(ratio), seed] = this.config(seed, {"select.ratio": ratio})
        methods = this.methods(seed)
        configs |= {(name, seed): c for name, c in methods.items() if name != "SLM"}
    runs = this.run(configs)
    best = {
        domain: min(RATIOS[:-1], key=lambda r: results.loss(runs, _name(r), domain).estimate)
        for domain in this.targets
    }
    text = [
        results.comparison(runs, [*this.targets, *this.corpus]),
        results.save(this, _figure(this, runs)),
        results.beside_paper(
            ("best of the ratios below 100 %", "about 60 % (accuracy)",
             ", ".join(f"{domain} {ratio:.0%} (loss)" for domain, ratio in best.items())),
        ),
    ]  # fmt: skip
    results.write(this, runs, results.rows(runs), "\n\n".join(text))


def _name(ratio: float) -> str:
    return f"SLM {ratio:.0%}"


def _figure(this: Study, runs: Runs) -> Figure:
    """Differences to CLM, paired, with their intervals, over the ratio."""
    names = [_name(ratio) for ratio in RATIOS[:-1]]
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for i, (domain, color) in enumerate(zip(this.targets, COLORS, strict=False)):
        found = [results.loss(runs, name, domain, minus=BASELINE) for name in names]
        x, y = np.array(RATIOS) * 100 + i, np.array([f.estimate for f in found] + [0.0])
        ends = np.array([[f.estimate - f.low, f.high - f.estimate] for f in found] + [[0, 0]]).T
        axes.errorbar(x, y, ends, fmt="o-", color=color, capsize=3, label=f"SLM, {domain}")
        mixture = results.loss(runs, "CLM on corpus + clean", domain, minus=BASELINE).estimate
        axes.axhline(mixture, color=color, ls=":", label=f"CLM on corpus + clean, {domain}")
        chance = results.loss(runs, "random selection", domain, minus=BASELINE).estimate
        axes.plot(60 + i, chance, "x", color=color, label=f"random 60 %, {domain}")
    axes.axhline(0, color=COLORS[1], lw=0.8)
    axes.set(xlabel="tokens selected (%)", ylabel="held-out loss minus CLM's\n(nats per token)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
