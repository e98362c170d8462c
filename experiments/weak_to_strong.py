"""Can a smaller reference guide a larger policy (Table 5)?

    python -m experiments.weak_to_strong [--scale=tiny|small|smollm2] [--seeds=3]
        --out=runs/weak_to_strong

The weak reference is a smaller model that has read the same corpus, trained on the clean text like
any reference. It costs less to train and to score with, which the FLOPs of the table count.
"""

import sys
from typing import Any

from ml_collections import ConfigDict

from experiments.lab import pool, results, study
from experiments.lab.results import BASELINE
from experiments.lab.study import CLM, Study
from rho1_jax.errors import require_known

# Changes that make the weak model and the strong one.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "debug": ({"model.preset": "micro"}, {}),  # only another shape: the policy is a nano
    "tiny": ({"model.preset": "nano"}, {}),
    "small": ({"model.preset": "nano"}, {}),
    "smollm2": ({}, {"model.init": "HuggingFaceTB/SmolLM2-360M"}),
}
CONTROLS = ("SLM", BASELINE, "CLM, matched FLOPs", "random selection", "inverse selection",
            "CLM on corpus + clean")  # fmt: skip


def run(this: Study) -> None:
    require_known("--scale for weak_to_strong", this.scale, MODELS)
    weak, strong = MODELS[this.scale]
    configs = {}
    for seed in range(this.seeds):
        guided = this.config(seed, strong)
        guided.reference.init = str(pool.place(this.pool, weak_reference(this, seed, weak)))
        methods = this.methods(seed, strong)
        configs["SLM, weak reference", seed] = guided
        configs |= {(name, seed): methods[name] for name in CONTROLS}
    runs = this.run(configs)
    text = [
        results.comparison(runs, [*this.targets, *this.corpus]),
        results.save(this, results.figure_of_curves(runs, this.targets)),
        results.beside_paper(
            ("SLM with a smaller reference against CLM (here: held-out loss, nats per token)",
             "better: a 1B reference, a 7B policy",
             results.differences(runs, "SLM, weak reference", this.targets)),
        ),
        "(reference) is the weak one.",
    ]  # fmt: skip
    results.write(this, runs, results.rows(runs), "\n\n".join(text))


def weak_reference(this: Study, seed: int, weak: dict[str, Any]) -> ConfigDict:
    """The smaller model trained on the clean text, as a run of its own; the rest is evaluated."""
    c = this.config(seed, {**CLM, **weak})
    for domain in c.data.corpus.values():
        domain.weight = 0.0
    c.data.corpus.update(c.data.clean)
    c.data.clean = ConfigDict()
    c.train.update({key: c.reference[key] for key in c.train if key in c.reference})
    return c


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
