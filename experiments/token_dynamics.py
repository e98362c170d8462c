"""How the loss of single tokens moves while CLM goes on (section 2.1, Figure 2, appendix D).

    python -m experiments.token_dynamics [--scale=tiny] [--seeds=3] --out=runs/token_dynamics

Held-out rows of the corpus at many checkpoints of CLM and of SLM. A line is fitted through each
token's losses: one that falls or rises by more than 0.2 nats is H->L or L->H, the others are H->H
or L->L by their last loss. tokens.html shows a passage, coloured by category.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

from experiments.lab import results, study, tables, tokens
from experiments.lab.study import CLM, Study
from experiments.lab.tokens import Tokens
from rho1_jax.analysis import dynamics, page
from rho1_jax.analysis.bootstrap import interval
from rho1_jax.analysis.dynamics import CATEGORIES

PAPER = {"H->H": 0.11, "L->H": 0.12, "H->L": 0.26, "L->L": 0.51}
SHADES = dict(zip(CATEGORIES, ("#D55E00", "#CC79A7", "#0072B2", "#009E73"), strict=True))
METHODS = {"CLM": CLM, "SLM": {}}
SHOWN = 3  # fluctuating tokens of a category


def run(this: Study) -> None:
    watched = tokens.watched(this.config(0).train.steps)
    runs = this.run(
        {
            (name, seed): this.config(seed, {**changes, **watched})
            for seed in range(this.seeds)
            for name, changes in METHODS.items()
        }
    )
    seen = {key: tokens.look(folder, this.corpus[0]) for key, folder in runs.items()}
    category = {key: dynamics.categories(t.losses, t.steps) for key, t in seen.items()}
    found = [row for key in seen for row in _rows(key, seen[key], category[key])]
    first = seen["CLM", 0]
    fig = _figure([seen["CLM", seed] for seed in range(this.seeds)])
    _page(this, first, category["CLM", 0])
    text = [
        f"{first.losses.shape[1]:,} held-out tokens of {this.corpus[0]} at {len(first.steps)} "
        "checkpoints; means over seeds (bands in the figure: all seeds).",
        _table(found),
        results.save(this, fig),
        "`tokens.html` shows a passage, coloured by category.",
        "Paper: the last column, a 1.1B model on 15B tokens of OpenWebMath.",
    ]
    results.write(this, runs, found, "\n\n".join(text))


def _rows(key: tuple[str, int], t: Tokens, category: np.ndarray) -> list[dict]:
    shares, curves = dynamics.shares(category), dynamics.mean_curves(t.losses, category)
    residual = dynamics.fit(t.losses, t.steps).residual
    found = []
    for i, name in enumerate(CATEGORIES):
        own = category == i
        row = {
            "method": key[0], "seed": key[1], "category": name, "share": shares[i],
            "first_loss": curves[i, 0], "last_loss": curves[i, -1],
            "fluctuation": residual[own].mean(),
        }  # fmt: skip
        if t.useful is not None:
            row["useful_share"] = t.useful[own].mean()
        found.append(row)
    return found


def _table(found: list[dict]) -> str:
    def mean(method: str, name: str, column: str) -> str:
        values = np.array(
            [r[column] for r in found if (r["method"], r["category"]) == (method, name)]
        )
        return results.said(interval(lambda seeds: float(values[seeds].mean()), [len(values)]))

    columns = {"share": "share", "first_loss": "first loss", "last_loss": "last loss",
               "fluctuation": "distance from the line", "useful_share": "useful"}  # fmt: skip
    columns = {key: name for key, name in columns.items() if key in found[0]}
    lines = [
        [method, name, *(mean(method, name, column) for column in columns),
         f"{PAPER[name]:.0%}" if method == "CLM" else ""]
        for method in METHODS for name in CATEGORIES
    ]  # fmt: skip
    return tables.markdown(["method", "category", *columns.values(), "share in the paper"], lines)


def _figure(seen: list[Tokens]):
    """Mean curves of the categories over seeds, and tokens that stray furthest from their line."""
    fig, (means, single) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    category = [dynamics.categories(t.losses, t.steps) for t in seen]
    curves = np.stack(
        [dynamics.mean_curves(t.losses, c) for t, c in zip(seen, category, strict=True)]
    )
    shares = np.mean([dynamics.shares(c) for c in category], axis=0)
    steps = seen[0].steps
    for i, (name, color) in enumerate(SHADES.items()):
        low, high = np.nanmin(curves[:, i], 0), np.nanmax(curves[:, i], 0)
        means.plot(
            steps, np.nanmean(curves[:, i], 0), color=color, label=f"{name} ({shares[i]:.0%})"
        )
        means.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
    means.set(xlabel="training step", ylabel="mean loss (nats per token)")
    means.set_title("categories of tokens", fontsize=10)
    for name, style in (("H->H", "-"), ("L->L", "--")):
        own = np.flatnonzero(category[0] == CATEGORIES.index(name))
        losses = seen[0].losses[:, own]
        for token in dynamics.most_fluctuating(losses, steps, SHOWN):
            single.plot(steps, losses[:, token], style, color=SHADES[name], lw=1.1)
    single.set(xlabel="training step", ylabel="loss of one token (nats)")
    single.set_title("fluctuating tokens (H->H solid, L->L dashed)", fontsize=10)
    fig.legend(
        *means.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    return fig


def _page(this: Study, t: Tokens, category: np.ndarray) -> None:
    """tokens.html: a held-out row with many kinds of tokens, each coloured by its category."""
    kinds = {row: len(set(category[t.row == row].tolist())) for row in np.unique(t.row)}
    own = t.row == max(kinds, key=lambda row: kinds[row])
    shades = list(SHADES.values())
    colored = zip(np.array(t.pieces, object)[own], [shades[i] for i in category[own]], strict=True)
    page.write(
        this.out / "tokens.html",
        "token_dynamics.html",
        folder=results.TEMPLATES,
        title="How the loss of each token moves",
        shades=SHADES,
        tokens=list(colored),
    )


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
