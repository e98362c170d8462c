"""Which tokens are selected, and how does that change during training (Figures 13 and 14)?

    python -m experiments.selected_tokens [--scale=tiny] [--seeds=3] --out=runs/selected_tokens

Held-out rows of the corpus, through the checkpoints of an SLM run: the tokens with the highest
excess loss at each, by type (data/taggers.py) and, where the corpus knows it, by source; and
how much of one checkpoint's selection is in another's. tokens.html shows passages.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

from experiments.lab import results, study, tables, tokens
from experiments.lab.study import Study
from experiments.lab.tokens import Tokens
from rho1_jax.analysis import page
from rho1_jax.analysis.bootstrap import interval
from rho1_jax.data.taggers import TAGS

PASSAGES = 4
VIEWS = 5  # checkpoints between which a passage's selections are compared, as in Figure 14


def run(this: Study) -> None:
    config = this.config(0)
    watched, ratio = tokens.watched(config.train.steps), config.select.ratio
    runs = this.run({("SLM", seed): this.config(seed, watched) for seed in range(this.seeds)})
    seen = [tokens.look(folder, this.corpus[0]) for folder in runs.values()]
    kept = [tokens.selections(t, ratio) for t in seen]  # [C, N] each
    kinds = [_kinds(t) for t in seen]
    names = [name for name in kinds[0] if all(k[name].any() for k in kinds)]
    # [seeds, kinds, C]: of the tokens of a kind, the share that is selected.
    shares = np.array(
        [[chosen[:, k[name]].mean(1) for name in names]
         for chosen, k in zip(kept, kinds, strict=True)]
    )  # fmt: skip
    overlap = np.mean([_overlap(chosen) for chosen in kept], axis=0)
    fig = _figure(names, shares, seen[0].steps, overlap, ratio)
    _page(this, seen[0], kept[0])
    found = [
        {"seed": seed, "kind": name, "share_of_tokens": kinds[seed][name].mean(),
         "step": step, "selected": shares[seed, i, c]}
        for seed in range(this.seeds) for i, name in enumerate(names)
        for c, step in enumerate(seen[seed].steps)
    ]  # fmt: skip
    head = ["kind", "of all tokens", "selected at first", "selected at last"]
    lines = [
        [name, f"{np.mean([k[name].mean() for k in kinds]):.1%}", _mean(shares[:, i, 0]),
         _mean(shares[:, i, -1])]
        for i, name in enumerate(names)
    ]  # fmt: skip
    text = [
        f"The {ratio:.0%} of the held-out tokens of {this.corpus[0]} with the highest excess loss, "
        f"{len(seen[0].pieces):,} tokens, by type (lines in the figure: all seeds):",
        tables.markdown(head, lines),
        f"The first and the last checkpoint select {overlap[0, -1]:.0%} of their tokens in common, "
        f"neighbours {np.diag(overlap, 1).mean():.0%}; by chance it would be {ratio:.0%}.",
        results.save(this, fig),
        "`tokens.html` shows passages, and how their selections change.",
    ]
    results.write(this, runs, found, "\n\n".join(text))


def _kinds(t: Tokens) -> dict[str, np.ndarray]:
    """name -> which tokens are of that kind, bool [N]."""
    kinds = {tag: t.tag == i for i, tag in enumerate(TAGS)}
    if t.useful is not None:
        kinds |= {"(clean source)": t.useful, "(noise)": ~t.useful}
    return kinds


def _overlap(kept: np.ndarray) -> np.ndarray:
    """[C, C]: of the tokens that a checkpoint selects, the share that another selects too."""
    x = kept.astype(float)
    return x @ x.T / x.sum(1, keepdims=True)


def _mean(values: np.ndarray) -> str:
    found = interval(lambda seeds: float(values[seeds].mean()), [len(values)])
    return results.said(found, digits=2)


def _figure(names, shares, steps, overlap, ratio):
    fig, (bars, grid) = plt.subplots(1, 2, figsize=(8.6, 3.6), layout="constrained")
    for c, marker, color in ((0, "o", "#56B4E9"), (-1, "s", "#0072B2")):
        values = shares[:, :, c]
        places = np.arange(len(names)) + (-0.12 if c == 0 else 0.12)
        bars.hlines(places, values.min(0), values.max(0), color=color, lw=1.6)
        label = "first checkpoint" if c == 0 else "last checkpoint"
        bars.plot(values.mean(0), places, marker, color=color, ms=5, label=label)
    bars.axvline(ratio, color="0.4", lw=0.9, ls=":", label="all tokens")
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.set(xlabel="share of the kind that is selected", xlim=(0, 1.02))
    picture = grid.imshow(overlap, vmax=1, cmap="cividis", origin="lower")
    every = max(1, len(steps) // 5)
    grid.set_xticks(range(0, len(steps), every), steps[::every])
    grid.set_yticks(range(0, len(steps), every), steps[::every])
    grid.set(xlabel="selected at step", ylabel="also selected at step")
    fig.colorbar(picture, ax=grid, label=f"share in common (chance: {ratio:.0%})")
    fig.legend(*bars.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return fig


def _page(this: Study, t: Tokens, kept: np.ndarray) -> None:
    """tokens.html: passages as the last checkpoint selects, and in how many of VIEWS it did."""
    views = kept[np.linspace(0, len(kept) - 1, VIEWS).round().astype(int)]
    times = views.sum(0)
    rows, ref_loss = np.unique(t.row), t.ref_loss
    marked, changing = [], []
    for row in rows[np.linspace(0, len(rows) - 1, min(PASSAGES, len(rows))).astype(int)]:
        own = t.row == row
        pieces = np.array(t.pieces, object)[own].tolist()
        columns = [x[own] for x in (t.losses[-1], ref_loss, t.losses[-1] - ref_loss, kept[-1])]
        marked.append(page.passage(pieces, *columns, title=f"Held-out row {row}"))
        changing.append(list(zip(pieces, times[own].tolist(), strict=True)))
    page.write(
        this.out / "tokens.html",
        "selected_tokens.html",
        folder=results.TEMPLATES,
        title="Selected tokens",
        marked=marked,
        changing=changing,
        views=VIEWS,
    )


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
