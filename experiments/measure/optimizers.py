"""What each optimizer keeps for a parameter, and what a step takes with it, against AdamW.

    python -m experiments.measure.optimizers [--rounds=0: only bytes] [--sizes=small,37m]

Bytes are counted in the shapes of the training state (jax.eval_shape), gradient and average not
among them. The steps are of size small and 37m of benchmark.py, plain training, in one process,
every optimizer once a round in another order; `relative` is the median over rounds of a variant's
CPU time (of all threads) divided by AdamW's in the same round, with the least and the most.
Everything goes to experiments/optimizers.csv.
"""

import functools
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import tables
from experiments.measure.benchmark import SHAPES, Clock
from rho1_jax import command_line
from rho1_jax.models import llama, presets
from rho1_jax.models.architecture import Architecture
from rho1_jax.slm import step
from rho1_jax.slm.selection import Selection
from rho1_jax.training import optimizer

OUT = Path(__file__).parent.parent / "optimizers.csv"
COLUMNS = ("model", "optimizer", "moments_dtype", "b1", "bytes_a_parameter", "seconds", "relative",
           "least", "most", "rounds", "batch", "seq_len", "device", "versions")  # fmt: skip
COUNTED = ("smollm2-135m", "smollm2-360m", "tinyllama-1.1b", "mistral-7b")


class Variant(NamedTuple):
    optimizer: str
    moments_dtype: str = "float32"
    b1: float = 0.9

    def tx(self) -> Any:
        return optimizer.of(
            self.optimizer, lambda _: jnp.float32(1e-4), b1=self.b1, b2=0.95, weight_decay=0.1,
            clip=1.0, moments_dtype=self.moments_dtype,
        )  # fmt: skip


ADAMW = Variant("adamw")
VARIANTS = (
    ADAMW, Variant("adamw", "bfloat16"), Variant("muon"), Variant("muon", "bfloat16"),
    Variant("adafactor"), Variant("adafactor", "bfloat16"), Variant("adafactor", b1=0.0),
)  # fmt: skip


def bytes_a_parameter(variant: Variant, shape: Architecture) -> float:
    """Of the parameters and the optimizer's state."""
    params = jax.eval_shape(functools.partial(llama.init, shape), jax.random.key(0))
    state = jax.eval_shape(functools.partial(step.init_state, tx=variant.tx()), params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / llama.param_count(shape)


def step_costs(size: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    shape, batch, seq_len = SHAPES[size]
    shape = shape.computed(scan_layers=False)
    apply = functools.partial(llama.apply, config=shape)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, (batch, seq_len + 1)).astype(np.int32)
    rows = step.Batch(jnp.asarray(tokens), jnp.ones((batch, seq_len), bool))
    key, states, steps = jax.random.key(0), {}, {}
    for variant in VARIANTS:
        tx = variant.tx()
        method = step.Method(apply, apply, tx, Selection("all", 1.0), batch * seq_len)
        states[variant] = step.init_state(llama.init(shape, key), tx)
        fn = jax.jit(functools.partial(step.train_step, method=method), donate_argnums=0)
        steps[variant] = fn.lower(states[variant], None, rows, key).compile()
    for i in range(rounds + 1):
        if i < 2:  # the first round warms up
            clock = Clock()
        for j in rng.permutation(len(VARIANTS)):
            variant = VARIANTS[j]
            states[variant], _ = clock(variant, steps[variant], states[variant], None, rows, key)
    found = []
    for variant in VARIANTS:
        ratio = [a / b for a, b in zip(clock.cpu[variant], clock.cpu[ADAMW], strict=True)]
        found.append({
            "model": size, **variant._asdict(),
            "bytes_a_parameter": bytes_a_parameter(variant, shape),
            "seconds": statistics.median(clock.cpu[variant]), "relative": statistics.median(ratio),
            "least": min(ratio), "most": max(ratio), "rounds": rounds, "batch": batch,
            "seq_len": seq_len,
        })  # fmt: skip
    return found


def main(argv: Sequence[str]) -> None:
    asked = command_line.parse(argv, {"rounds": 30, "sizes": "small,37m"})
    found = [
        {"model": name, **variant._asdict(),
         "bytes_a_parameter": bytes_a_parameter(variant, presets.get(name))}
        for name in COUNTED
        for variant in VARIANTS
    ]  # fmt: skip
    if asked.rounds:
        for size in asked.sizes.split(","):
            found += step_costs(size, asked.rounds)
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    setting = {"device": f"{os.cpu_count()} CPU cores", "versions": versions}
    rows = [
        {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row | setting).items()}
        for row in found
    ]
    tables.replace(OUT, rows, ("model", "optimizer", "moments_dtype", "b1"), columns=COLUMNS)
    head = ("model", "optimizer", "first moment", "b1", "bytes a parameter", "time / AdamW")
    lines = []
    for row in rows:
        time = f"{row['relative']} ({row['least']} to {row['most']})" if "relative" in row else ""
        lines.append([*(row[name] for name in COLUMNS[:5]), time])
    print(tables.markdown(head, lines))


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
