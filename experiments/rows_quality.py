"""Is the approximate backward pass good enough? Gradients and held-out losses, rows against exact.

    python -m experiments.rows_quality [--scale=tiny] [--seeds=3] --out=runs/rows_quality

For each seed: SLM with the exact backward pass, with all blocks on selected rows, and with the
upper half of them; same base, data, reference and scores. And along the exact training of seed 0
the gradient of each on the same batches: its cosine with the exact one, and its length.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.lab import study, tables
from experiments.lab.study import Study
from experiments.lab.variants import compare
from rho1_jax.data import loader
from rho1_jax.models import llama, presets
from rho1_jax.pipeline import models
from rho1_jax.pipeline.workspace import Workspace, mixture
from rho1_jax.slm import step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.training import program, sharding

RATIOS = (0.6, 0.4)
LOOKS = 5  # gradients are compared at that many steps, the first and the last among them


def run(this: Study) -> None:
    n = presets.get(this.config(0).model.preset).n_layers
    tops = {"rows, upper half": n // 2, "rows, all blocks": n}
    compared = gradients(this, tops)
    this.out.mkdir(parents=True, exist_ok=True)
    tables.write(this.out / "gradients.csv", compared)
    compare(
        this,
        {name: {"train.backward_rows_top": top} for name, top in tops.items()},
        text=f"Gradient against the exact one, on the same batches of seed 0:\n\n{_said(compared)}",
    )


def gradients(this: Study, tops: Mapping[str, int]) -> list[dict[str, Any]]:
    """Cosine with, and length relative to, the exact gradient, along exact training of seed 0."""
    config = this.config(0)
    folder = this.run({"SLM": config})["SLM"]
    mesh = sharding.make_mesh(**config.mesh)
    found = []
    with jax.set_mesh(mesh):
        for ratio in RATIOS:
            c = ConfigDict(config.to_dict())
            c.select.ratio = ratio
            here = Workspace(c, folder, mesh)
            found += [{"ratio": ratio, **row} for row in _along_training(here, tops)]
    return found


def _along_training(here: Workspace, tops: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    c, t = here.config, here.config.train
    params, shape = models.initial(here)
    apply = functools.partial(llama.apply, config=shape)

    def step_fn(tx: optax.GradientTransformation, top: int) -> Callable:
        how = SelectedRows(here.selection, top, shape.n_layers) if top else None
        method = step.Method(
            apply=functools.partial(apply, rowwise=how), ref_apply=apply, tx=tx,
            selection=here.selection, chunk_tokens=c.loss_chunk_tokens,
        )  # fmt: skip
        return functools.partial(step.train_step, method=method)

    def gradient_fn(top: int) -> Callable:
        descent = optax.sgd(1.0)  # moves the parameters by the gradient itself

        def gradient(params, batch):
            state = step.init_state(params, descent)
            after = step_fn(descent, top)(state, None, batch, here.key)[0].params
            return jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, params, after))[0]

        return jax.jit(gradient)

    exact, approximate = gradient_fn(0), {name: gradient_fn(top) for name, top in tops.items()}
    _, tx = program.optimizer_of(t, t.steps)
    train_step = jax.jit(step_fn(tx, 0))
    state = step.init_state(params, tx)
    batches = loader.train_batches(
        here.train_rows(c.data.corpus), **mixture(c, "train", t.steps), start_step=0,
        num_steps=t.steps, scores=here.cached_scores(),
    )  # fmt: skip
    looks = set(np.linspace(0, t.steps - 1, LOOKS).round().astype(int).tolist())
    for i, batch in enumerate(map(here.put, batches)):
        if i in looks:
            true = exact(state.params, batch)
            for name, fn in approximate.items():
                g = fn(state.params, batch)
                size, true_size = jnp.linalg.norm(g), jnp.linalg.norm(true)
                cosine = float(jnp.vdot(g, true) / size / true_size)
                yield {
                    "method": name, "step": i, "cosine": round(cosine, 5),
                    "length": round(float(size / true_size), 5),
                }  # fmt: skip
        state, _ = train_step(state, None, batch, here.key)


def _said(compared: list[dict[str, Any]]) -> str:
    """A Markdown table: the cosines over the steps."""
    steps = list(dict.fromkeys(row["step"] for row in compared))
    lines: dict[tuple[float, str], list[str]] = {}
    for row in compared:
        line = lines.setdefault((row["ratio"], row["method"]), [])
        line.append(f"{row['cosine']:.3f}")
    head = ["k", "method", *(f"cosine at step {i}" for i in steps)]
    return tables.markdown(head, [[str(k), name, *line] for (k, name), line in lines.items()])


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
