"""What a training step costs: CLM, SLM as people write it, and SLM here, against each other.

    python -m experiments.benchmark --size=37m --out=runs/benchmark [--rounds=5] [--torch]

Every variant runs once per round, in turn, from one process, so that whatever else the machine does
hits all of them; the table holds the median over rounds of each one's time divided by CLM's in the
same round, with the smallest and largest. On CPU the time is CPU time (of all threads), and the wall
clock is beside it; on GPU the wall clock. `bound` is the ratio of the FLOPs, counted in the traced
step with loops multiplied out. `temp` is what the compiler reserves beside arguments and results.
"""

import collections
import csv
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's idle threads must not spin

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from rho1_jax.models import llama, presets
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import losses, step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.slm.selection import Selection
from rho1_jax.slm.step import Batch
from rho1_jax.training import optimizer

SHAPES = {  # shape, batch, sequence length
    "small": (presets.get("tiny"), 8, 256),
    "37m": (
        LlamaConfig(vocab_size=32_000, width=512, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=64,
                    ffn_width=1280), 4, 512,
    ),
    "135m": (presets.get("smollm2-135m"), 2, 512),
    "1.1b": (presets.get("tinyllama-1.1b"), 4, 2048),
}  # fmt: skip
COLUMNS = ("size", "variant", "ratio", "seconds", "relative", "least", "most", "bound",
           "wall_seconds", "wall_relative", "temp_mib", "device", "batch", "seq_len", "dtype", "remat",
           "jax")  # fmt: skip
TX = optimizer.adamw(lambda _: 1e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0)

Step = Callable[..., Any]


def naive_step(state, ref_params, batch, _key, *, apply, ratio, masked=True):
    """One step as it is usually written: all logits, autodiff through the masked mean."""

    def token_loss(params):
        hidden, head = apply(params, batch.tokens[:, :-1])
        logits = losses.logits_of(hidden.reshape(-1, hidden.shape[-1]), head)
        return losses.loss_of(logits, batch.tokens[:, 1:].reshape(-1))

    def loss_fn(params):
        loss = token_loss(params)
        if not masked:
            return loss.mean()
        ref = token_loss(ref_params) if batch.ref_loss is None else batch.ref_loss.reshape(-1)
        excess = jax.lax.stop_gradient(loss - ref)
        threshold = jax.lax.top_k(excess, round(ratio * excess.size))[0][-1]
        mask = excess >= threshold
        return jnp.sum(loss * mask) / mask.sum()

    grads = jax.grad(loss_fn)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    return step.TrainState(
        state.step + 1, optax.apply_updates(state.params, updates), opt_state
    ), optax.tree.norm(grads)


def variants(
    shape: LlamaConfig, ratios: list[float], chunk_tokens: int
) -> dict[tuple[str, float], Step]:
    """(name, ratio) -> step(state, ref_params, batch, key)."""
    apply = functools.partial(llama.apply, config=shape)

    def ours(selection, apply=apply):
        return functools.partial(
            step.train_step, apply=apply, ref_apply=apply, tx=TX, selection=selection,
            chunk_tokens=chunk_tokens,
        )  # fmt: skip

    def rows(selection, top):
        how = SelectedRows(selection, top, shape.n_layers, save_products=shape.remat != "full")
        return ours(selection, functools.partial(apply, rowwise=how))

    out: dict[tuple[str, float], Step] = {("CLM", 1.0): ours(Selection("all", 1.0))}
    out["CLM, autodiff", 1.0] = functools.partial(naive_step, apply=apply, ratio=1.0, masked=False)
    for k in ratios:
        selection, naive = (
            Selection("excess", k),
            functools.partial(naive_step, apply=apply, ratio=k),
        )
        out["SLM naive, live", k] = naive
        out["SLM naive, cached", k] = naive
        out["selective head", k] = ours(selection)
        for m in dict.fromkeys([shape.n_layers, shape.n_layers // 2, shape.n_layers // 3]):
            out[f"rows, top {m} of {shape.n_layers}", k] = rows(selection, m)
    return out


def flops(jaxpr) -> float:
    """FLOPs of the matrix products in a jaxpr, loops multiplied out; of a branch, the last one."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            a = eqn.invars[0].aval
            k = math.prod(a.shape[i] for i in contracted)
            total += 2.0 * k * eqn.outvars[0].aval.size
        inner = [flops(sub) for sub in jex.core.jaxprs_in_params(eqn.params)]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += times * (inner[-1] if eqn.primitive.name == "cond" else sum(inner))
    return total


class Timer:
    """Seconds of CPU and of wall clock of calls, by variant."""

    def __init__(self):
        self.cpu, self.wall = collections.defaultdict(list), collections.defaultdict(list)

    def __call__(self, key, fn):
        wall, cpu = time.perf_counter(), time.process_time()
        out = fn()
        self.cpu[key].append(time.process_time() - cpu)
        self.wall[key].append(time.perf_counter() - wall)
        return out
