"""Selective backward against autodiff that drops the same Jacobians, on the real decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rho1_jax.models import llama, rotary
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.rowwise import EveryRow
from rho1_jax.slm import losses, step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.slm.selection import Domain, Selection, top_k_mask
from rho1_jax.training import sharding

SHAPE = LlamaConfig(
    vocab_size=32, width=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=24,
)  # fmt: skip
B, S, RATIO = 8, 12, 0.4
TX = optax.sgd(1.0)


def batch():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 32, (B, S + 1)).astype(np.int32))
    valid = jnp.asarray(np.arange(S) < rng.integers(S // 2, S + 1, (B, 1)))
    ref_loss = jnp.asarray(rng.normal(3, 1, (B, S)), jnp.float32)
    return step.Batch(tokens, valid, {"ref_loss": ref_loss})


def random_params(shape=SHAPE):
    return jax.tree.map(lambda x: 3.0 * x, llama.init(shape, jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class DroppedJacobians:
    """The definition: what a function of rows makes of unselected rows is a constant."""

    mask: np.ndarray = dataclasses.field(hash=False)
    top: int = SHAPE.n_layers
    calls: list = dataclasses.field(default_factory=list, hash=False)

    def start(self, *_):
        self.calls.clear()

    def enter(self, marks):
        self.calls.append("block")
        return marks

    def __call__(self, f, marks, weights, *xs):
        y = f(jnp.matmul, weights, *xs)
        if len(self.calls) <= SHAPE.n_layers - self.top:
            return y, marks
        return jnp.where(self.mask.reshape(-1, 1), y, jax.lax.stop_gradient(y)), marks

    def finish(self, hidden, _marks):
        return hidden


def oracle(params, data, top, ratio=RATIO, shape=SHAPE, domains=()):
    """The update of one step of sgd(1): minus the gradient."""
    # Unrolled without nn.scan, whose body is traced once for all layers.
    shape = dataclasses.replace(shape, remat="none")

    def apply(params, rowwise):
        x = params["embed"][data.tokens[:, :-1]].reshape(-1, shape.width)
        angles = rotary.table(jnp.arange(S), shape.head_dim, shape.rope_theta, None)
        rowwise.start(B, S)
        for i in range(shape.n_layers):
            layer = jax.tree.map(lambda w, i=i: w[i], params["layers"])
            (x, _), _ = llama.Block(shape, None, rowwise).apply(
                {"params": layer}, (x, None), angles
            )
        x = llama._rms_norm(x, params["final_norm"], shape.norm_eps)
        return losses.loss_of(losses.logits_of(x, params["embed"]), data.tokens[:, 1:].reshape(-1))

    loss = apply(params, EveryRow()).reshape(B, S)
    excess, valid = (loss - data.cached["ref_loss"]).reshape(-1), data.valid.reshape(-1)
    mask = top_k_mask(excess, valid, ratio)
    if domains:  # the second of two is always trained
        own = jnp.broadcast_to(data.domain[:, None] == 1, (B, S)).reshape(-1)
        mask = top_k_mask(excess, valid & ~own, ratio) | (valid & own)
    rowwise = DroppedJacobians(np.asarray(mask), top)
    grads = jax.grad(lambda p: jnp.sum(apply(p, rowwise), where=mask) / mask.sum())(params)
    return jax.tree.map(lambda p, g: p - g, params, grads)


def updated(params, data, top, *, remat="none", accumulation=1, ratio=RATIO, mesh=None, domains=()):
    shape = dataclasses.replace(SHAPE, remat=remat)
    selection = Selection("excess", ratio, domains=domains)
    if mesh is not None:
        shape = dataclasses.replace(shape, batch_axes=sharding.token_axes(mesh))
        shards, parts = sharding.n_batch_shards(mesh), mesh.shape["sequence"]
        selection = dataclasses.replace(selection, n_shards=shards, row_parts=parts)
    rowwise = SelectedRows(
        selection, top, SHAPE.n_layers, accumulation > 1, save_products=remat != "full"
    )
    apply = functools.partial(llama.apply, config=shape)
    method = step.Method(
        apply=functools.partial(apply, rowwise=rowwise), ref_apply=apply, tx=TX,
        selection=selection, chunk_tokens=10_000, accumulation=accumulation,
    )  # fmt: skip
    fn = jax.jit(functools.partial(step.train_step, method=method))
    return fn(step.init_state(params, TX), None, data, jax.random.key(0))[0].params


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), a, b)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("top", [0, 1, 3])
def test_drops_the_jacobians_of_unselected_rows_and_nothing_else(top, remat):
    expected = oracle(random_params(), batch(), top)
    close(updated(random_params(), batch(), top, remat=remat), expected)


def test_oracles_differ():
    """Or the test above could not fail."""
    exact, rows = (oracle(random_params(), batch(), top)["layers"]["down"] for top in (0, 3))
    change = exact - random_params()["layers"]["down"]
    assert jnp.linalg.norm(exact - rows) > 0.01 * jnp.linalg.norm(change)


@pytest.mark.parametrize("share", [0.5, 0.05])  # expected; where there are more, they overflow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_of_a_domain_that_is_always_trained(share, accumulation):
    domains = Domain("noisy", 1.0 - share), Domain("clean", share, 1.0)
    data = batch()._replace(domain=jnp.arange(B) // 2 % 2)
    expected = oracle(random_params(), data, 3, domains=domains)
    close(updated(random_params(), data, 3, accumulation=accumulation, domains=domains), expected)


@pytest.mark.parametrize("top", [1, 3])
def test_accumulation_gives_the_same(top):
    close(
        updated(random_params(), batch(), top, accumulation=4),
        updated(random_params(), batch(), top),
    )


@pytest.mark.parametrize(
    ("mesh_shape", "ratio", "accumulation"),
    [((8, 1, 1), RATIO, 1), ((1, 4, 2), 0.05, 1), ((1, 4, 1, 2), RATIO, 2)],
)
def test_eight_devices_give_the_same(mesh_shape, ratio, accumulation):
    """At 5 % some devices keep more than their share: their rows overflow."""
    data, params = batch(), random_params()
    one = updated(params, data, 3, ratio=ratio)
    mesh = sharding.make_mesh(*mesh_shape)
    on_host = {"tokens": data.tokens, "valid": data.valid, **data.cached}
    on_host = {name: np.asarray(x) for name, x in on_host.items()}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        many = updated(
            placed, sharding.batch_to_devices(on_host, mesh), 3, ratio=ratio, mesh=mesh,
            accumulation=accumulation,
        )  # fmt: skip
    close(one, many)
