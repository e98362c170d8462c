"""One device, and 2, 4 or 8 cut along any axis: the same losses, masks and gradients, by scope."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from rho1_jax.models import llama
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import losses, step
from rho1_jax.slm.selection import Domain, Selection, select
from rho1_jax.training import sharding
from tests.slm.test_selection import oracle

SHAPE = LlamaConfig(
    vocab_size=32, width=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24,
    tied_head=False,
)  # fmt: skip
RATIO = 0.4
SCOPES = {"batch": 1, "microbatch": 2, "shard": 1, "sequence": 1}  # and how many accumulation steps
# data, fsdp, tensor and, where rows are cut, sequence
WIDE = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 1, 4), (1, 2, 2, 2)]
NARROW = [
    (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (1, 1, 1, 2), (1, 1, 1, 4),
    (1, 4, 1, 2), (2, 1, 2, 2),
]  # fmt: skip
# Keeps the gradient as the optimizer's state.
KEEP = optax.GradientTransformation(
    init=lambda params: params, update=lambda grads, *_: (grads, grads)
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def host_batch(cut):
    """Many short rows, or a few long ones, to be cut."""
    n_rows, seq_len = (4, 64) if cut else (16, 12)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (n_rows, seq_len + 1)).astype(np.int32)
    valid = np.arange(seq_len) < rng.integers(1, seq_len + 1, (n_rows, 1))
    return {"tokens": tokens, "valid": valid, "domain": np.arange(n_rows, dtype=np.int32) % 3}


@functools.cache
def on(
    mesh_shape, scope, n_shards, cut=False, accumulation=1, window=None, chunk_tokens=10_000,
    **changes,
):  # fmt: skip
    """Per-token losses of policy and reference, and the step's gradient and counts, on a mesh."""
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    plain = Selection("excess", RATIO, scope, n_shards=n_shards, row_parts=mesh.shape["sequence"])
    selection = dataclasses.replace(plain, **changes)
    shape = dataclasses.replace(SHAPE, window=window, batch_axes=sharding.token_axes(mesh))
    apply = functools.partial(llama.apply, config=shape)
    with jax.set_mesh(mesh):
        params, ref = (llama.init(shape, jax.random.key(i)) for i in (0, 1))
        params, ref = jax.device_put((params, ref), 2 * (sharding.parameter_shardings(ref, mesh),))
        batch = sharding.batch_to_devices(host_batch(cut), mesh)
        method = step.Method(
            apply=apply, ref_apply=apply, tx=KEEP, selection=selection, chunk_tokens=chunk_tokens,
            accumulation=accumulation,
        )  # fmt: skip

        @jax.jit
        def everything(params, ref, batch):
            view = functools.partial(losses.next_token_losses, apply, chunk_tokens=chunk_tokens)
            loss, ref_loss = (view(p, batch.tokens)[0] for p in (params, ref))
            signals = {"loss": loss, "valid": batch.valid, "ref_loss": ref_loss}
            signals["domain"] = batch.domain[:, None]
            mask = [
                select(selection, {name: x[i::n] for name, x in signals.items()})
                for n in (SCOPES[scope],)
                for i in range(n)
            ]
            state = step.init_state(params, KEEP)
            state, metrics = step.train_step(state, ref, batch, jax.random.key(0), method=method)
            return loss, ref_loss, mask, state.opt_state, metrics

        return jax.tree.map(np.asarray, everything(params, ref, batch))


def defined_mask(loss, ref_loss, valid, scope, n_shards):
    """Which tokens a scope keeps, in numpy: the best of each group of neighbouring rows."""
    groups = {"batch": 1, "microbatch": 1, "shard": n_shards, "sequence": len(loss)}[scope]
    cut = (x.reshape(groups, -1) for x in (loss - ref_loss, valid))
    return np.concatenate([oracle(s, v, RATIO) for s, v in zip(*cut, strict=True)])


@pytest.mark.parametrize(
    ("mesh_shape", "scope"),
    # The paper's scope on the largest meshes, and nightly on those that are parts of them; the
    # others, which need less from other devices, on two.
    [(mesh_shape, "batch") for mesh_shape in WIDE]
    + [pytest.param(mesh, "batch", marks=pytest.mark.nightly) for mesh in NARROW]
    + [((2, 2, 2), scope) for scope in SCOPES if scope != "batch"]
    + [((2, 1, 1, 4), "microbatch"), ((4, 1, 1, 2), "shard"), ((4, 1, 1, 2), "sequence")],
    ids=str,
)
def test_devices_do_not_change_losses_masks_and_gradients(mesh_shape, scope):
    n_shards, cut = mesh_shape[0] * mesh_shape[1], len(mesh_shape) > 3
    # What the shard scope keeps depends on the number of shards, not on where they lie.
    n = SCOPES[scope]
    one = on((1, 1, 1), scope, n_shards if scope == "shard" else 1, cut, n)
    many = on(mesh_shape, scope, n_shards, cut, 4 // n_shards if cut else n)  # a row at a time
    loss, ref_loss, masks, grads, metrics = many
    jax.tree.map(close, (loss, ref_loss, grads, metrics), (one[0], one[1], one[3], one[4]))
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, one[2][i])
        parts = (x[i::n] for x in (loss, ref_loss, host_batch(cut)["valid"]))
        wanted = defined_mask(*parts, scope, n_shards)
        np.testing.assert_array_equal(mask.reshape(-1), wanted)
    assert metrics["selected"] == sum(mask.sum() for mask in masks)
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-2  # there is one


DOMAINS = tuple(Domain(name, 1 / 3, ratio) for name, ratio in (("a", 0), ("b", 1.0), ("c", 0.2)))


@pytest.mark.parametrize(
    ("mesh_shape", "accumulation"), [((8, 1, 1), 2), ((2, 2, 2), 1), ((2, 1, 1, 4), 2)], ids=str
)
def test_devices_do_not_change_what_competes(mesh_shape, accumulation):
    """Each domain's own ratio, in numpy; on eight devices some keep all they have, and overflow.
    The tokens that are kept have weights, and the reference teaches."""
    n_shards, cut = mesh_shape[0] * mesh_shape[1], len(mesh_shape) > 3
    changes = {"domains": DOMAINS, "weight_range": 0.5, "weight_slope": 2.0}
    changes |= {"distill_weight": 0.5, "distill_top": 4}
    one = on((1, 1, 1), "batch", 1, cut, **changes)
    many = on(mesh_shape, "batch", n_shards, cut, accumulation, **changes)
    loss, ref_loss, (mask,), grads, metrics = many
    jax.tree.map(close, (loss, ref_loss, grads, metrics), (one[0], one[1], one[3], one[4]))
    batch, expected = host_batch(cut), 0
    excess = (loss.astype(np.float64) - ref_loss).reshape(-1)
    for number, domain in enumerate(DOMAINS):
        among = batch["valid"] & (batch["domain"] == number)[:, None]
        kept = oracle(excess, among.reshape(-1), domain.ratio or RATIO)
        assert metrics[f"selected/{domain.name}"] == kept.sum()
        assert metrics[f"tokens/{domain.name}"] == among.sum()
        expected |= kept
    np.testing.assert_array_equal(mask.reshape(-1), expected)
    assert metrics["selected"] == expected.sum()


@pytest.mark.parametrize(
    ("mesh_shape", "window", "chunk_tokens"),
    [((2, 2, 1, 2), 7, 100), ((1, 2, 1, 4), None, 24)]
    + [
        pytest.param(*rest, marks=pytest.mark.nightly)
        for rest in [
            ((2, 2, 1, 2), None, 24), ((2, 2, 1, 2), 20, 10_000), ((1, 2, 1, 4), 20, 10_000),
            ((1, 2, 1, 4), 7, 100),
        ]
    ],
    ids=str,
)  # fmt: skip
def test_cut_rows_with_windows_and_with_logits_in_chunks(mesh_shape, window, chunk_tokens):
    n_shards = mesh_shape[0] * mesh_shape[1]
    one = on((1, 1, 1), "batch", 1, True, 1, window)
    many = on(mesh_shape, "batch", n_shards, True, 4 // n_shards, window, chunk_tokens)
    jax.tree.map(close, many, one)
