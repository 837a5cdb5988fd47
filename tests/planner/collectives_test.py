"""The parser against programs written by hand, and against bytes counted by hand on real ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easylm_jax.mesh import make_mesh
from easylm_jax.planner.collectives import collectives

MESH = {"replica": 2, "fsdp": 4, "sequence": 1, "tensor": 1}

# As the TPU compiler prints it: a loop of 6 around a loop from 2 to 8 whose body was unrolled, an
# all-gather that is moved on in two fusions, and a sum of which each chip keeps a slice.
HLO = """\
HloModule jit_f, is_scheduled=true

%inner_cond (p: (u32[], bf16[8,128])) -> pred[] {
  %p = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = u32[]{:T(128)} constant(8), metadata={op_name="x"}
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%inner_body (p: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %p = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %collective-permute-start.1 = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},\
{5,6},{6,7},{7,4}}, metadata={op_name="jit(f)/jvp(g)/while/body/mlp/up/dot_general"}
  %collective-permute-done.1 = bf16[8,128]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %t = (u32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%next, %collective-permute-done.1)
}

%start_fusion (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.7 = f32[32]{0} all-gather(%p), channel_id=2, \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
}

%hidden_in_work (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.8 = f32[32]{0} all-gather(%p), channel_id=2, \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
}

%all-reduce-scatter.3 (p: f32[16,4]) -> f32[4,4] {
  %p = f32[16,4]{1,0} parameter(0)
  %all-reduce.9 = f32[16,4]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], \
to_apply=%sum
  ROOT %slice = f32[4,4]{1,0} dynamic-slice(%all-reduce.9, %p), dynamic_slice_sizes={4,4}
}

%all-reduce-scatter.4 (p: f32[16,4]) -> f32[4,4] {
  %p = f32[16,4]{1,0} parameter(0)
  %all-reduce.10 = f32[16,4]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], \
to_apply=%sum
  ROOT %slice = f32[4,4]{1,0} dynamic-slice(%all-reduce.10, %p), dynamic_slice_sizes={4,4}
}

%outer_cond (q: (s32[], bf16[8,128])) -> pred[] {
  %q = (s32[], bf16[8,128]{1,0}) parameter(0)
  %six = s32[] constant(6)
  %k = s32[] get-tuple-element(%q), index=0
  ROOT %lt.2 = pred[] compare(%k, %six), direction=LT
}

%outer_body (q: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %q = (s32[], bf16[8,128]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %one = s32[] constant(1)
  %start = u32[] constant(2)
  %y = bf16[8,128]{1,0} get-tuple-element(%q), index=1
  %init = (u32[], bf16[8,128]{1,0}) tuple(%start, %y)
  %loop = (u32[], bf16[8,128]{1,0}) while(%init), condition=%inner_cond, body=%inner_body
  %begin = f32[32]{0} fusion(%y), kind=kCustom, calls=%start_fusion
  %go_on = f32[32]{0} fusion(%y), kind=kOutput, calls=%hidden_in_work
  %scattered = f32[4,4]{1,0} fusion(%y), kind=kCustom, \
calls=%all-reduce-scatter.3, metadata={op_name="jit(f)/transpose(jvp(g))/while/body/mlp/up/dot"}
  %another = f32[4,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.4, \
metadata={op_name="jit(f)/transpose(jvp(g))/while/body/mlp/up/dot"}
  %more = s32[] add(%k, %one)
  ROOT %r = (s32[], bf16[8,128]{1,0}) tuple(%more, %y)
}

ENTRY %main (a: bf16[8,128]) -> f32[] {
  %a = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[8,128]{1,0}) tuple(%zero, %a)
  %layers = (s32[], bf16[8,128]{1,0}) while(%first), condition=%outer_cond, body=%outer_body
  %all-reduce.1 = (f32[]{:T(128)}, f32[10]{0}) all-reduce(%a, %a), channel_id=4, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum
  ROOT %out = f32[] get-tuple-element(%all-reduce.1), index=0
}
"""


def test_loops_fusions_and_all_notations_of_groups_are_understood():
    found = sorted(
        (c.kind, c.dtype, c.bytes, c.times, c.group_size, c.axes) for c in collectives(HLO, MESH)
    )
    assert found == [
        ("all-gather", "f32", 128, 6, 4, ("fsdp",)),
        ("all-reduce", "f32", 44, 1, 2, ("replica",)),
        ("collective-permute", "bf16", 2048, 6 * 3, 4, ("fsdp",)),
        *2 * [("reduce-scatter", "f32", 256, 6, 4, ("fsdp",))],  # two, though of one channel
    ]
    names = {c.kind: c.where for c in collectives(HLO, MESH)}
    assert names["collective-permute"] == "mlp/up/dot_general"
    assert names["reduce-scatter"] == "backward mlp/up/dot"


def test_what_goes_from_slice_to_slice_is_counted():
    """As the TPU compiler prints it for two slices: a send to its runtime for several slices."""
    hlo = """\
ENTRY %main (p: f32[47,8,128]) -> f32[47,8,128] {
  %p = f32[47,8,128]{2,1,0:T(8,128)} parameter(0)
  %send = (f32[47,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%p, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target=\
"{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    (found,) = collectives(hlo, MESH)
    assert (found.kind, found.dtype, found.axes, found.group_size) == (
        *("all-reduce", "f32", ("slices",)),
        2,
    )
    assert found.sent_bytes == found.bytes == 47 * 8 * 128 * 4


def test_what_a_ring_sends():
    sent = {c.kind: c.sent_bytes for c in collectives(HLO, MESH)}
    assert sent["all-gather"] == 6 * 128 * 3 / 4 and sent["reduce-scatter"] == 6 * 256 * 3 / 4
    assert sent["all-reduce"] == 2 * 44 / 2 and sent["collective-permute"] == 18 * 2048


@pytest.mark.parametrize("spec", ["1,8,1,1", "2,4,1,1", "2,2,1,2"])
def test_a_scan_over_sharded_layers_gathers_each_layer_once(spec):
    """Weights [L, D, F] split over fsdp; the batch too: XLA gathers D x F of every layer."""
    mesh, (L, D, F) = make_mesh(spec), (5, 64, 96)
    fsdp = mesh.shape["fsdp"]

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P(("replica", "fsdp"))))
    def forward(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, None)))
            return jnp.tanh(x @ w) @ w.T, None

        return jax.lax.scan(layer, x, weights)[0]

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    x = shape((16, D), sharding=NamedSharding(mesh, P(("replica", "fsdp"))))
    weights = shape((L, D, F), sharding=NamedSharding(mesh, P(None, "fsdp")))
    hlo = forward.lower(x, weights).compile().as_text()
    gathers = [c for c in collectives(hlo, mesh.shape) if c.kind == "all-gather"]
    assert sum(c.bytes * c.times for c in gathers) == L * D * F * 4
    assert {(c.group_size, c.axes) for c in gathers} == {(fsdp, ("fsdp",))}
