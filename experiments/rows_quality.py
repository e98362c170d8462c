"""Is the approximate backward pass good enough? Gradients and held-out losses, rows against exact.

    python -m experiments.rows_quality --out=runs/rows_quality [--seeds=3]

On the embedded corpus of configs/math.py and for each seed: SLM with the exact backward pass, with
all blocks on selected rows, and with the upper half; same data, reference and scores. Held-out
losses go to rows_quality.csv. Then, along the exact run, the gradient of each on the same batches.
"""

import csv
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from absl import app, flags
from ml_collections import ConfigDict

from configs import math as math_config
from rho1_jax import main as rho1
from rho1_jax.data import loader
from rho1_jax.models import llama
from rho1_jax.run import Run, weights
from rho1_jax.slm import step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.training import optimizer, sharding
from rho1_jax.training.interruption import StopSignal

N_BLOCKS, STEPS, LOOK_EVERY = 4, 200, 50
METHODS = {"exact": 0, "rows, upper half": N_BLOCKS // 2, "rows, all": N_BLOCKS}


def run_config(seed: int, top: int) -> ConfigDict:
    c = ConfigDict(math_config.get_config().to_dict())
    c.update_from_flattened_dict(
        {"seed": seed, "train.steps": STEPS, "reference.steps": 100, "eval.every": 100,
         "train.backward_rows_top": top}
    )  # fmt: skip
    return c


def heldout_losses(out: Path, seed: int) -> list[dict[str, Any]]:
    """Trains each method; held-out losses of each domain at the end."""
    found = []
    exact = out / f"seed{seed}" / "exact"
    for name, top in METHODS.items():
        folder = exact.with_name(name.replace(", ", "_").replace(" ", "_"))
        if name != "exact" and not folder.exists():
            for part in ("data", "reference", "scores"):
                shutil.copytree(exact / part, folder / part)
        rho1.run(run_config(seed, top), folder)
        policy = json.loads((folder / "eval.json").read_text())["policy"]
        for domain, result in policy.items():
            what = {"seed": seed, "method": name, "step": STEPS, "what": f"held-out loss, {domain}"}
            found.append(what | {"value": result["loss"]})
    return found


def gradient_cosines(out: Path, seed: int, ratio: float) -> list[dict[str, Any]]:
    """Cosine and length of each gradient against the exact one, along exact training."""
    c = run_config(seed, 0)
    c.select.ratio = ratio
    mesh = sharding.make_mesh(-1, 1, 1)
    found: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        run = Run(c, out / f"seed{seed}" / "exact", mesh, StopSignal(mesh))
        params, shape = run.initial_model()
        scores = run.cached_scores(run.reference()[0])
        apply = functools.partial(llama.apply, config=shape)
        common: dict[str, Any] = {
            "ref_apply": apply, "selection": run.selection, "chunk_tokens": c.loss_chunk_tokens
        }  # fmt: skip

        def gradient_fn(top):
            how = SelectedRows(run.selection, top, N_BLOCKS) if top else None
            fn: Any = functools.partial(
                step.train_step, apply=functools.partial(apply, rowwise=how), tx=optax.sgd(1.0),
                **common,
            )  # fmt: skip

            def gradient(params, batch):
                state = step.init_state(params, optax.sgd(1.0))
                after = fn(state, None, batch, run.key)[0].params
                return jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, params, after))[0]

            return jax.jit(gradient)

        gradients = {name: gradient_fn(top) for name, top in METHODS.items()}
        t = c.train
        schedule = optimizer.schedule(t.lr, t.warmup_steps, STEPS, t.final_lr_share)
        tx = optimizer.adamw(schedule, b1=t.b1, b2=t.b2, weight_decay=t.weight_decay, clip=t.clip)
        train_step = jax.jit(functools.partial(step.train_step, apply=apply, tx=tx, **common))
        state = step.init_state(params, tx)
        batches = loader.train_batches(
            run.train_rows(c.data.corpus), weights(c.data.corpus), batch_size=t.batch_size,
            seed=seed, start_step=0, num_steps=STEPS, scores=scores,
        )  # fmt: skip
        for i, batch in enumerate(map(run.put, batches)):
            if i in (0, 10) or i % LOOK_EVERY == LOOK_EVERY - 1:
                g = {name: fn(state.params, batch) for name, fn in gradients.items()}
                size = jnp.linalg.norm(g["exact"])
                for name in list(METHODS)[1:]:
                    norm = jnp.linalg.norm(g[name])
                    cosine = jnp.vdot(g[name], g["exact"]) / norm / size
                    what = {"seed": seed, "method": name, "step": i}
                    found.append(what | {"what": f"cosine, k={ratio}", "value": float(cosine)})
                    found.append(what | {"what": f"norm, k={ratio}", "value": float(norm / size)})
                print(found[-4:], flush=True)
            state, _ = train_step(state, None, batch, run.key)
    return found


def main(_) -> None:
    out = Path(flags.FLAGS.out)
    found: list[dict[str, Any]] = []
    for seed in range(flags.FLAGS.seeds):
        found += heldout_losses(out, seed)
        if seed == 0:
            found += [row for k in (0.6, 0.4) for row in gradient_cosines(out, seed, k)]
        with (out / "rows_quality.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, ("seed", "method", "step", "what", "value"))
            writer.writeheader()
            writer.writerows(row | {"value": f"{row['value']:.5g}"} for row in found)


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/rows_quality", "folder for runs and rows_quality.csv")
    flags.DEFINE_integer("seeds", 3, "seeds")
    app.run(main)
