"""Collectives in optimized HLO: recorded TPU text, and programs compiled for CPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from btlm_jax.perf import hlo
from btlm_jax.perf.hlo import Collective

# From XLA:TPU, shortened: a loop whose length is only in its condition; in its body an all-gather
# with a start, a step inside the fusion of a product, and a done; a fused reduce-scatter.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[2])->f32[2]}, num_partitions=16

%start (p: bf16[1,160,6912]) -> (bf16[1,160,6912], bf16[1,2560,6912]) {
  %p = bf16[1,160,6912]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,2560,6912]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=69, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.13 = (bf16[1,160,6912]{2,1,0}, bf16[1,2560,6912]{2,1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (p: bf16[1,160,6912]) -> (f32[8]) {
  %p = bf16[1,160,6912]{2,1,0} parameter(0)
  %all-gather.2 = bf16[1,2560,6912]{2,1,0} all-gather(%p), channel_id=69, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %tuple.1 = (f32[8]{0}) tuple(%x)
}

%done (p: bf16[1,160,6912]) -> bf16[1,2560,6912] {
  %p = bf16[1,160,6912]{2,1,0} parameter(0)
  %all-gather.3 = bf16[1,2560,6912]{2,1,0} all-gather(%p), channel_id=69, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.17 = bf16[1,2560,6912]{2,1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.clone.1 (input.6: f32[6912,2560]) -> f32[432,2560] {
  %input.6 = f32[6912,2560]{1,0} parameter(0)
  %all-reduce.243 = f32[6912,2560]{1,0:T(8,128)} all-reduce(%input.6), channel_id=100, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[432,2560]{1,0} dynamic-slice(%all-reduce.243, %a, %b)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]) parameter(0)
  %async.1 = (bf16[1,160,6912]{2,1,0}, bf16[1,2560,6912]{2,1,0}) fusion(%t), kind=kCustom, calls=%start
  %fusion.2 = (f32[8]{0}) fusion(%async.1), kind=kOutput, calls=%step
  %fusion.3 = bf16[1,2560,6912]{2,1,0} fusion(%async.1), kind=kCustom, calls=%done
  %fusion.4 = f32[432,2560]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.clone.1
  ROOT %tuple = (s32[], f32[8]) tuple(%i, %x)
}

%condition (t.2: (s32[], f32[8])) -> pred[] {
  %constant.32 = s32[]{:T(128)} constant(32)
  %i.2 = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %constant.32), direction=LT
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %while.1 = (s32[]{:T(128)}, f32[8]{0}) while(%tuple.655), condition=%condition, body=%body
  %all-reduce.9 = (f32[]{:T(128)}, f32[2560]{0:T(1024)}, /*index=2*/bf16[4]{0}) all-reduce(%a, %b, %c), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%add
  %collective-permute-start.2 = (f32[288,2560]{1,0}, f32[288,2560]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%slice), channel_id=1, source_target_pairs={{0,1},{1,2}}
  %collective-permute-done.2 = f32[288,2560]{1,0} collective-permute-done(%collective-permute-start.2)
  %recv.45 = (f32[1024]{0}, u32[], token[]) recv(%after-all.45), channel_id=29, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.45 = (f32[1024]{0}, u32[], token[]) send(%x, %after-all.45), channel_id=30, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.46 = (bf16[1,320,6912]{2,1,0}, u32[], token[]) send(%x, %after-all.45), channel_id=30, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  ROOT %r = f32[2]{0} copy(%x)
}
"""  # noqa: E501


def test_collectives_of_a_recorded_tpu_program():
    program = hlo.count_collectives(TPU)
    gathered, scattered = 32 * 2 * 2560 * 6912, 32 * 4 * 6912 * 2560
    reduced, permuted = 4 + 4 * 2560 + 2 * 4, 4 * 288 * 2560
    across = 2 * 2 * 320 * 6912
    assert program.unknown_loops == 0
    assert set(program.collectives) == {
        Collective("all-gather", "ici", 32, gathered, gathered * 15 / 16),
        Collective("reduce-scatter", "ici", 32, scattered, scattered * 3 / 4),
        Collective("all-reduce", "ici", 1, reduced, 2 * reduced * 7 / 8),
        Collective("collective-permute", "ici", 1, permuted, permuted),
        Collective("all-reduce", "dcn", 1, 4096, 4096),
        Collective("all-gather", "dcn", 1, across, across / 2),
    }


def test_a_loop_of_unknown_length_is_reported():
    text = TPU.replace("direction=LT", "direction=NE")
    program = hlo.count_collectives(text)
    assert program.unknown_loops == 1
    assert {c.count for c in program.collectives} == {1}


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="not the text of an HLO module: found 'hello'"):
        hlo.count_collectives("hello")


def test_collectives_of_a_compiled_program():
    """Nested loops with four kinds of collectives, over 4 of 8 devices."""
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    gather = functools.partial(jax.lax.all_gather, axis_name="b", tiled=True)

    def fn(x):  # [4, 16] per device
        def inner(c, _):
            return c + gather(x * c[:4, :1]), None

        def outer(c, _):
            c, _ = jax.lax.scan(inner, c, length=5)
            return jax.lax.psum(c, "b") / 4, None

        c, _ = jax.lax.scan(outer, jnp.ones((16, 16)), length=3)
        c = jax.lax.psum_scatter(c, "b", tiled=True)
        return jax.lax.ppermute(c, "b", [(0, 1), (1, 0)])  # [4, 16] again

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=jax.NamedSharding(mesh, P("b", None)))
    mapped = jax.shard_map(fn, mesh=mesh, out_specs=P("b"), check_vma=False)
    program = hlo.count_collectives(jax.jit(mapped).lower(x).compile().as_text())
    assert program.unknown_loops == 0
    found = {c.kind: c for c in program.collectives}
    whole = 16 * 16 * 4
    assert found["all-gather"] == ("all-gather", "ici", 15, 15 * whole, 15 * whole * 3 / 4)
    assert found["all-reduce"][2:] == (3, 3 * whole, 3 * whole * 2 * 3 / 4)
    assert found["reduce-scatter"][2:] == (1, whole, whole * 3 / 4)
    assert found["collective-permute"][2:] == (1, whole / 4, whole / 4)


def test_a_program_without_collectives():
    text = jax.jit(lambda x: x + 1).lower(1.0).compile().as_text()
    assert hlo.count_collectives(text) == ((), 0)
