"""A model of one's own under Selective Language Modeling: a Flax NNX module through `train_step`.

`python -m docs.examples.own_model`

The method asks of a model `apply(params, inputs [B, S]) -> (hidden [B, S, D], lm_head [V, D])`, and
nothing else. Here the reference is the same module after some steps on clean rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rho1_jax.slm import step
from rho1_jax.slm.selection import Selection

VOCAB, WIDTH, ROWS, LENGTH = 64, 32, 8, 16


class Convolution(nnx.Module):
    """A causal convolution over an embedding that is the head, too."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mix = nnx.Conv(WIDTH, WIDTH, kernel_size=(4,), padding="CAUSAL", rngs=rngs)

    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.nn.gelu(self.mix(self.embed(inputs))), self.embed.embedding[...]


def trained(
    selection: Selection, n_steps: int, noise: float, ref_params: Any = None
) -> tuple[Any, list[float]]:
    """(parameters, loss per selected token of each step) of a new model on `rows`."""
    graph, params, others = nnx.split(Convolution(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params: Any, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graph, params, others)(inputs)

    method = step.Method(
        apply=apply,
        ref_apply=apply,
        tx=optax.adamw(1e-2),
        selection=selection,
        chunk_tokens=ROWS * LENGTH,
    )
    update = jax.jit(functools.partial(step.train_step, method=method))
    state, losses = step.init_state(params, method.tx), []
    for i in range(n_steps):
        batch = rows(jax.random.key(i), noise)
        state, metrics = update(state, ref_params, batch, jax.random.key(0))
        losses.append(float(metrics["loss_selected"] / metrics["selected"]))
    return state.params, losses


def rows(key: jax.Array, noise: float) -> step.Batch:
    """Counting up, with `noise` of the tokens replaced."""
    start, where, what = jax.random.split(key, 3)
    first = jax.random.randint(start, (ROWS, 1), 0, VOCAB)
    tokens = (first + jnp.arange(LENGTH + 1)) % VOCAB
    replaced = jax.random.bernoulli(where, noise, tokens.shape)
    tokens = jnp.where(replaced, jax.random.randint(what, tokens.shape, 0, VOCAB), tokens)
    return step.Batch(tokens, jnp.ones((ROWS, LENGTH), bool))


def main(n_steps: int = 100) -> tuple[list[float], list[float]]:
    """(loss per token of the reference's steps, of the policy's on the tokens it selects)."""
    reference, clean = trained(Selection("all"), n_steps, noise=0.0)
    _, kept = trained(Selection("excess", 0.6), n_steps, noise=0.4, ref_params=reference)
    print(f"reference {clean[0]:.2f} -> {clean[-1]:.2f} nats on clean rows")
    print(f"policy    {kept[0]:.2f} -> {kept[-1]:.2f} nats on what it selects of noisy ones")
    return clean, kept


if __name__ == "__main__":
    main()
