"""Selecting without any clean text: the reference is trained on the corpus itself (Tables 3, 4).

    python -m experiments.self_reference [--scale=tiny] [--seeds=3] --out=runs/self_reference

Tokens are kept where that reference has a low loss, where it is sure (low entropy), where both hold
(intersection, with the realised share in the table) or where either does (union).
"""

import sys

from ml_collections import ConfigDict

from experiments.lab import results, study
from experiments.lab.results import BASELINE
from experiments.lab.study import Study

BOTH = (("reference", 1.0), ("entropy", 1.0))
GRID = {
    f"{name} {ratio:.0%}": {"select.score": score, "select.ratio": ratio, "select.parts": parts}
    for name, score, parts, ratios in (
        ("reference loss", "reference", (), (0.6, 0.8)),
        ("entropy", "entropy", (), (0.6, 0.8)),
        ("intersection", "intersection", BOTH, (0.8,)),
        ("union", "union", BOTH, (0.6,)),
    )
    for ratio in ratios
}


def run(this: Study) -> None:
    configs = {}
    for seed in range(this.seeds):
        for name, changes in GRID.items():
            configs[name, seed] = of_itself(this.config(seed, changes))
        configs |= {(name, seed): c for name, c in this.methods(seed).items()}
    runs = this.run(configs)
    shown = {key: run for key, run in runs.items() if key[0] in (*GRID, BASELINE)}
    text = [
        results.comparison(runs, [*this.targets, *this.corpus]),
        results.save(this, results.figure_of_curves(shown, this.targets)),
        results.beside_paper(
            ("intersection of both scores against CLM (here: held-out loss, nats per token)",
             "better, with the fewest tokens selected",
             results.differences(runs, "intersection 80%", this.targets)),
            ("either score alone against CLM", "better",
             results.differences(runs, "reference loss 80%", this.targets)),
        ),
        "SLM and the inverse selection here have the reference of clean text, for comparison; "
        "(reference) is the one trained on the corpus.",
    ]  # fmt: skip
    results.write(this, runs, results.rows(runs), "\n\n".join(text))


def of_itself(c: ConfigDict) -> ConfigDict:
    """`c` with a reference trained on its corpus; the clean text is only evaluated on."""
    clean, corpus = c.data.clean, c.data.corpus
    c.data.clean = ConfigDict({n: d.to_dict() for n, d in corpus.items() if d.weight})
    for name, domain in clean.items():
        corpus[name] = ConfigDict({**domain.to_dict(), "weight": 0.0})
    return c


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
