"""Does the loss on selected tokens foretell downstream results (Figures 6, 7 and 8)?

    python -m experiments.downstream_correlation [--scale=tiny] [--seeds=3] --out=runs/...

The checkpoints of a CLM and an SLM run on held-out rows of the corpus: mean loss on the tokens that
the starting model and the reference select, and on the others (Figure 6); against the held-out loss
of the target domain, with linear and logarithmic fits (Figure 7); and the loss on what each
checkpoint itself selects, seen from all checkpoints (Figure 8).
"""

import itertools
import sys

import matplotlib.pyplot as plt
import numpy as np

from experiments.lab import results, study, tables, tokens
from experiments.lab.study import CLM, Study
from rho1_jax.analysis import correlation
from rho1_jax.analysis.bootstrap import interval

METHODS = {"SLM": {}, "CLM": CLM}
PARTS = {"selected": "#0072B2", "unselected": "#D55E00"}


def run(this: Study) -> None:
    config = this.config(0)
    watched, ratio = tokens.watched(config.train.steps), config.select.ratio
    runs = this.run(
        {
            (name, seed): this.config(seed, {**changes, **watched})
            for seed in range(this.seeds)
            for name, changes in METHODS.items()
        }
    )
    steps, losses, later = _losses(this, runs, ratio)
    found = [
        {"method": method, "seed": seed, "step": step, "domain": part, "loss": values[seed, c]}
        for (method, part), values in losses.items()
        for seed in range(this.seeds) for c, step in enumerate(steps)
    ]  # fmt: skip
    text = [
        f"Downstream is the held-out loss on {this.targets[0]} (nats per token); the corpus is "
        f"{this.corpus[0]}.",
        _fits(losses),
        "r is Pearson's, over checkpoints; the intervals come from seeds. Equation 7 of the paper "
        "prints y = log(a L + c) with a > 0 for selected tokens, for y an accuracy, which rises as "
        "losses fall: its sign contradicts its Figure 7. Here y is a loss, so a > 0 says that both "
        "fall together; the last column is what is left of R2 if a must have the other sign.",
        results.save(this, _figure(steps, losses, later)),
    ]
    results.write(this, runs, found, "\n\n".join(text))


def _losses(this: Study, runs: results.Runs, ratio: float):
    """Steps [C]; (method, part) -> losses [seeds, C]; and Figure 8's [C, C], mean over seeds.

    Selected is what SLM selects at its start: both methods start from the same base.
    """
    seeds = range(this.seeds)
    corpus = {key: tokens.look(folder, this.corpus[0]) for key, folder in runs.items()}
    target = {key: tokens.look(folder, this.targets[0]) for key, folder in runs.items()}
    kept = [tokens.selections(corpus["SLM", seed], ratio) for seed in seeds]
    losses = {}
    for method in METHODS:
        own = [corpus[method, seed].losses for seed in seeds]
        pairs = list(zip(own, [masks[0] for masks in kept], strict=True))
        losses[method, "selected"] = np.array([x[:, mask].mean(1) for x, mask in pairs])
        losses[method, "unselected"] = np.array([x[:, ~mask].mean(1) for x, mask in pairs])
        downstream = [target[method, seed].losses.mean(1) for seed in seeds]
        losses[method, "downstream"] = np.array(downstream)
    later = [[corpus["SLM", seed].losses[:, mask].mean(1) for mask in kept[seed]] for seed in seeds]
    return corpus["SLM", 0].steps, losses, np.mean(later, axis=0)


def _fits(losses) -> str:
    """A table: for each method and part, r and both fits."""
    lines = []
    for method, part in itertools.product(METHODS, PARTS):
        x, y = losses[method, part], losses[method, "downstream"]
        r = interval(
            lambda seeds, x=x, y=y: float(
                np.mean([correlation.correlation(x[s], y[s]) for s in seeds])
            ),
            [len(x)],
        )
        mean_x, mean_y = x.mean(0), y.mean(0)
        line, log = correlation.linear(mean_x, mean_y), correlation.logarithmic(mean_x, mean_y)
        other = correlation.logarithmic(mean_x, mean_y, -1 if log.a > 0 else 1)
        lines.append(
            [method, part, results.said(r, sign=True, digits=2), f"{line.a:+.2f}", f"{line.r2:.2f}",
             f"{log.a:+.2f}", f"{log.r2:.2f}", f"{round(other.r2, 2) + 0.0:.2f}"]
        )  # fmt: skip
    head = ["method", "tokens", "r", "linear: a", "R2", "logarithmic: a", "R2", "R2, other sign"]
    return tables.markdown(head, lines)


def _figure(steps, losses, later):
    fig, grid = plt.subplots(2, 2, figsize=(8.6, 6.2), layout="constrained")
    panels = grid.flat
    parts = {**PARTS, "downstream": "#000000"}
    for (method, style), (part, color) in itertools.product(
        {"SLM": "-", "CLM": "--"}.items(), parts.items()
    ):
        values = losses[method, part] - losses[method, part][:, :1]
        panels[0].plot(steps, values.mean(0), style, color=color, label=f"{part}, {method}")
        panels[0].fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, lw=0)
    panels[0].set(xlabel="training step", ylabel="loss minus the first (nats per token)")
    for axes, (part, color) in zip(panels[1:3], PARTS.items(), strict=True):
        for method, marker in (("SLM", "o"), ("CLM", "s")):
            x, y = (losses[method, name].mean(0) for name in (part, "downstream"))
            fit = correlation.logarithmic(x, y)
            fine = np.linspace(x.min(), x.max(), 50)
            filled = color if method == "SLM" else "none"
            axes.plot(x, y, marker, color=color, mfc=filled, ms=4.5, label=f"{part}, {method}")
            axes.plot(fine, np.log(fit.a * fine + fit.c), color=color, lw=1,
                      ls="-" if method == "SLM" else "--")  # fmt: skip
        axes.set(xlabel=f"loss on {part} tokens (nats)", ylabel="downstream loss (nats)")
        axes.set_title("filled: SLM, open: CLM", fontsize=10)
    views = np.linspace(0, len(steps) - 1, 5).round().astype(int)
    for i, color in zip(views, plt.get_cmap("viridis")(np.linspace(0, 0.9, 5)), strict=True):
        panels[3].plot(steps, later[i], color=color, label=f"step {steps[i]}")
    panels[3].set(xlabel="training step", ylabel="SLM's loss (nats per token)")
    panels[3].legend(
        title="tokens selected at", frameon=False, fontsize=8, title_fontsize=8,
        loc="upper left", bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
    fig.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return fig


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
