"""One device, and 2, 4 or 8 cut along any axis: the same losses, masks and gradients, by scope."""

import functools

import jax
import numpy as np
import optax
import pytest

from rho1_jax.models import llama
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import losses, step
from rho1_jax.slm.scores import Signals
from rho1_jax.slm.selection import Selection, select
from rho1_jax.training import sharding
from tests.slm.test_selection import oracle

SHAPE = LlamaConfig(
    vocab_size=32, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24,
    tied_head=False, batch_axes=sharding.BATCH_AXES,
)  # fmt: skip
ROWS, SEQ, RATIO = 16, 12, 0.4
SCOPES = {"batch": 1, "microbatch": 2, "shard": 1, "sequence": 1}  # and how many accumulation steps
MESHES = [
    (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (8, 1, 1), (1, 8, 1), (2, 2, 2),
]  # fmt: skip
APPLY = functools.partial(llama.apply, config=SHAPE)
# Keeps the gradient as the optimizer's state.
KEEP = optax.GradientTransformation(
    init=lambda params: params, update=lambda grads, *_: (grads, grads)
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def host_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (ROWS, SEQ + 1)).astype(np.int32)
    valid = np.arange(SEQ) < rng.integers(1, SEQ + 1, (ROWS, 1))
    return {"tokens": tokens, "valid": valid}


@functools.cache
def on(mesh_shape, scope, n_shards):
    """Per-token losses of policy and reference, and the step's gradient and counts, on a mesh."""
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    selection = Selection("excess", RATIO, scope, n_shards=n_shards)
    with jax.set_mesh(mesh):
        params, ref = (llama.init(SHAPE, jax.random.key(i)) for i in (0, 1))
        params, ref = jax.device_put((params, ref), 2 * (sharding.parameter_shardings(ref, mesh),))
        batch = sharding.batch_to_devices(host_batch(), mesh)
        train_step = functools.partial(
            step.train_step, apply=APPLY, ref_apply=APPLY, tx=KEEP, selection=selection,
            chunk_tokens=10_000, accumulation=SCOPES[scope],
        )  # fmt: skip

        @jax.jit
        def everything(params, ref, batch):
            view = functools.partial(losses.next_token_losses, APPLY, chunk_tokens=10_000)
            loss, ref_loss = (view(p, batch.tokens)[0] for p in (params, ref))
            mask = [
                select(selection, Signals(loss[i::n], batch.valid[i::n], ref_loss[i::n]))
                for n in (SCOPES[scope],)
                for i in range(n)
            ]
            state = step.init_state(params, KEEP)
            state, metrics = train_step(state, ref, batch, jax.random.key(0))
            return loss, ref_loss, mask, state.opt_state, metrics

        return jax.tree.map(np.asarray, everything(params, ref, batch))


def defined_mask(loss, ref_loss, valid, scope, n_shards):
    """Which tokens a scope keeps, in numpy: the best of each group of neighbouring rows."""
    groups = {"batch": 1, "microbatch": 1, "shard": n_shards, "sequence": len(loss)}[scope]
    cut = (x.reshape(groups, -1) for x in (loss - ref_loss, valid))
    return np.concatenate([oracle(s, v, RATIO) for s, v in zip(*cut, strict=True)])


@pytest.mark.parametrize(
    ("mesh_shape", "scope"),
    # The paper's scope on every mesh; the others, which need less from other devices, on one.
    [(mesh_shape, "batch") for mesh_shape in MESHES]
    + [((2, 2, 2), scope) for scope in SCOPES if scope != "batch"],
    ids=str,
)
def test_devices_do_not_change_losses_masks_and_gradients(mesh_shape, scope):
    n_shards = mesh_shape[0] * mesh_shape[1]
    # What the shard scope keeps depends on the number of shards, not on where they lie.
    one = on((1, 1, 1), scope, n_shards if scope == "shard" else 1)
    many = on(mesh_shape, scope, n_shards)
    loss, ref_loss, masks, grads, metrics = many
    jax.tree.map(close, (loss, ref_loss, grads, metrics), (one[0], one[1], one[3], one[4]))
    n = SCOPES[scope]
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, one[2][i])
        parts = (x[i::n] for x in (loss, ref_loss, host_batch()["valid"]))
        wanted = defined_mask(*parts, scope, n_shards)
        np.testing.assert_array_equal(mask.reshape(-1), wanted)
    assert metrics["selected"] == sum(mask.sum() for mask in masks)
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-2  # there is one
