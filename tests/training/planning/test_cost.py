"""FLOPs of a jaxpr and costs of a compiled program, by hand numbers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rho1_jax.models import splash
from rho1_jax.training.planning import cost

PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%p), channel_id=4, to_apply=%add
  ROOT %s = f32[8]{0} slice(%r), slice={[0:8]}
}

%body (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
  %x = f32[64]{0} get-tuple-element(%t), index=1
  %f = f32[64]{0} fusion(%x), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"10"}}
  %g = (f32[64]{0}, f32[512]{0}) all-gather-start(%f), channel_id=2, dimensions={0}
  %h = f32[8]{0} fusion(%f), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], f32[64]{0}) tuple(%x, %f)
}

%condition (t2: (s32[], f32[64])) -> pred[] {
  %t2 = (s32[]{:T(128)}, f32[64]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t2), index=0
  %n = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%rare (r0: f32[64]) -> f32[64] {
  %r0 = f32[64]{0} parameter(0)
  ROOT %r1 = f32[64]{0} fusion(%r0), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"1000"}}
}

%usual (u0: f32[64]) -> f32[64] {
  %u0 = bf16[64]{0} parameter(0)
  ROOT %u1 = bf16[64]{0} collective-permute(%u0), channel_id=3, source_target_pairs={{0,1}}
}

ENTRY %main (x0: f32[64]) -> f32[64] {
  %x0 = f32[64]{0} parameter(0)
  %first = f32[64]{0} fusion(%x0), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"5"}}
  %loop = (s32[], f32[64]{0}) while(%first), condition=%condition, body=%body
  %either = f32[64]{0} conditional(%first, %x0, %x0), branch_computations={%rare, %usual}
  ROOT %total = f32[64]{0} all-reduce(%first), channel_id=1, to_apply=%add
}
"""  # noqa: E501


def test_a_program_by_hand():
    p = cost.read(PROGRAM)
    assert p.cycles == 5 + 7 * 10
    assert p.traffic == {
        "all-gather": (7, 7 * (512 - 64) * 4),
        "reduce-scatter": (7, 7 * 64 * 4),
        "collective-permute": (1, 64 * 2),
        "all-reduce": (1, 2 * 64 * 4),
    }
    assert p.endless == 0


def test_a_loop_without_a_known_end_counts_once_and_is_told():
    p = cost.read(PROGRAM.replace("constant(7)", "parameter(1)"))
    assert (p.cycles, p.endless) == (15, 1)


def test_what_the_compiler_has_no_estimate_of_is_left_out_and_counted():
    before = cost.read(PROGRAM)
    after = cost.read(PROGRAM.replace('"10"', f'"{2**63 - 1}"'))
    assert (before.unknown, after.unknown) == (0, 1)
    assert 0 < after.cycles < before.cycles


def flops(f, *shapes, **kwargs):
    return cost.flops(jax.make_jaxpr(f)(*map(jnp.zeros, shapes)).jaxpr, **kwargs)


def test_loops_are_multiplied_and_unused_products_left_out():
    def f(x):
        _ = x @ x @ x
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    assert flops(f, (8, 8)) == 5 * 2 * 8**3


def test_devices_of_a_shard_map_are_added_up():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
    f = jax.shard_map(jnp.matmul, mesh=mesh, **specs)
    assert flops(f, (8, 6), (6, 2)) == 2 * 8 * 6 * 2


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
def test_kernels_count_all_their_tiles(heads, kv_heads):
    """Forward 2 products, backward 3 for queries and 4 for keys and values; causal or not."""

    def loss(q, k, v):
        return splash.attention(q, k, v, window=None, batch_axes=None).sum()

    shapes = (2, 256, heads, 64), (2, 256, kv_heads, 64), (2, 256, kv_heads, 64)
    product = 2 * 2 * heads * 256**2 * 64
    forward = flops(loss, *shapes)
    assert forward == 2 * product
    both = flops(jax.value_and_grad(loss, (0, 1, 2)), *shapes)
    # What is outside the kernel (the row sums of its backward pass) is a product, too: of 1 / 256.
    assert both == pytest.approx((2 + 3 + 4) * product, rel=1e-3)
    assert flops(loss, *shapes, kernels=False) == 0
