"""Test reading HLO programs: handwritten, and compiled for eight CPU devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxgpt.tools.hlo import Program, replica_groups

BY_HAND = """HloModule by_hand, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_slice (param_0: f32[10,100], param_1: s32[]) -> f32[1,100] {
  %param_0 = f32[10,100]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%param_0, %param_1, %zero)
}

%fused_update (param_0.1: f32[10,100], param_1.1: f32[1,100], param_2: s32[]) -> f32[10,100] {
  %param_0.1 = f32[10,100]{1,0} parameter(0)
  %param_1.1 = f32[1,100]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[10,100]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %zero.1)
}

%body (carry: (s32[], f32[10,100])) -> (s32[], f32[10,100]) {
  %carry = (s32[], f32[10,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[10,100]{1,0} get-tuple-element(%carry), index=1
  %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_slice
  %summed = f32[1,100]{1,0} all-reduce(%row), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %new = f32[10,100]{1,0} fusion(%x, %summed, %i), kind=kLoop, calls=%fused_update
  ROOT %out = (s32[], f32[10,100]{1,0}) tuple(%i, %new)
}

%condition (carry.1: (s32[], f32[10,100])) -> pred[] {
  %carry.1 = (s32[], f32[10,100]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %bound = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: (s32[], f32[10,100])) -> (s32[], f32[10,100]) {
  %p = (s32[], f32[10,100]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[], f32[10,100]{1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_handwritten_loop_has_expected_kernels_traffic_and_collectives():
    program = Program(BY_HAND)
    assert (program.entry, program.devices, program.execution_counts["body"]) == ("main", 4, 7)
    assert program.kernels().total() == 7 * 3
    # slice and update: read a row, write a row, read the row number; sum: read and write a row
    assert program.traffic() == 7 * ((400 + 400 + 4) + (400 + 400) + (400 + 400 + 4))
    assert ("f32", (10, 100)) in program.arrays()
    (found,) = program.collectives()
    assert (found.kind, found.times, found.bytes, found.group) == ("all-reduce", 7, 400, (0, 1))


PRODUCTS = """HloModule products

%fused_dot (a: f32[5,7], b: f32[7,3]) -> f32[5,3] {
  %a = f32[5,7]{1,0} parameter(0)
  %b = f32[7,3]{1,0} parameter(1)
  ROOT %dot = f32[5,3]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[5,7], w: f32[7,3]) -> f32[5,3] {
  %x = f32[5,7]{1,0} parameter(0)
  %w = f32[7,3]{1,0} parameter(1)
  %y = f32[5,3]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused_dot
  %z = f32[5,3]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %q = bf16[2,4,16,8]{3,2,1,0} custom-call(%y), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %sum = f32[5,3]{1,0} add(%y, %z)
}
"""


def test_breakdown_groups_kernels_by_kind_and_counts_their_flops():
    """A product takes two operations per element and summed index; causal attention half of 4."""
    groups = Program(PRODUCTS).breakdown(lambda kind, flops, traffic: flops + traffic)
    assert {kind: group.kernels for kind, group in groups.items()} == {
        "matmuls": 2, "attention, forward": 1, "memory": 1
    }  # fmt: skip
    assert groups["matmuls"].flops == 2 * (2 * 5 * 3 * 7)
    assert groups["matmuls"].bytes == 2 * 4 * (5 * 7 + 7 * 3 + 5 * 3)
    assert groups["attention, forward"].flops == 2 * 2 * 4 * 16 * 16 * 8
    assert groups["memory"].flops == 0
    total = sum(group.bytes for group in groups.values())
    assert total == Program(PRODUCTS).traffic()
    for group in groups.values():
        assert group.seconds == group.flops + group.bytes


CUBLAS = """HloModule cublas

ENTRY %main (x: f32[5,7], w: f32[7,3]) -> f32[3,5] {
  %x = f32[5,7]{1,0} parameter(0)
  %w = f32[7,3]{1,0} parameter(1)
  %call = (f32[5,3]{1,0}, s8[1000]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %y = f32[5,3]{1,0} get-tuple-element(%call), index=0
  ROOT %transpose.1 = f32[3,5]{1,0} transpose(%y), dimensions={1,0}
}
"""


def test_cublas_call_counts_as_a_product_without_its_workspace():
    program = Program(CUBLAS)
    assert program.kinds() == {"call": "matmuls", "transpose.1": "copies"}
    group = program.breakdown(lambda kind, flops, traffic: 0)["matmuls"]
    assert (group.flops, group.bytes) == (2 * 5 * 3 * 7, 4 * (5 * 7 + 7 * 3 + 5 * 3))


@pytest.mark.parametrize(
    ("line", "kind", "operations"),
    [
        ('%f.1 = (bf16[2,16,4,8], f32[2]) custom-call(%x), x={op_name="/flash/pallas_call"}',
         "attention, forward", 2),
        ('%f.2 = bf16[2,16,4,8] custom-call(%x), metadata={op_name="a/flash_dkv/pallas_call"}',
         "attention, backward", 4),
        ("%splash_mha_dq_no_residuals.4 = (f32[8,64], bf16[2,4,16,8]) custom-call(%x)",
         "attention, backward", 3),
    ],
)  # fmt: skip
def test_breakdown_knows_flash_kernels_in_pallas(line, kind, operations):
    text = f"ENTRY %main (x: f32[5,7]) -> f32[5] {{\n  %x = f32[5,7] parameter(0)\n  {line}\n}}\n"
    groups = Program(text).breakdown(lambda *_: 0.0)
    assert {kind: group.flops for kind, group in groups.items()} == {
        kind: operations * 2 * 4 * 16 * 16 * 8
    }


def test_gradient_of_shared_keys_and_values_has_the_flops_of_all_query_heads():
    """The kernel returns the gradients of one head of keys and values for four of queries."""
    text = """ENTRY %main (q: bf16[2,16,4,8], k: bf16[2,16,1,8]) -> bf16[2,16,1,8] {
  %q = bf16[2,16,4,8] parameter(0)
  %k = bf16[2,16,1,8] parameter(1)
  %d = bf16[2,16,1,8] custom-call(%q, %k), metadata={op_name="a/flash_dkv/pallas_call"}
}
"""
    assert Program(text).breakdown(lambda *_: 0.0)["attention, backward"].flops == (
        4 * 2 * 4 * 16 * 16 * 8
    )


def test_breakdown_of_a_loop_counts_every_turn():
    groups = Program(BY_HAND).breakdown(lambda kind, flops, traffic: 1)
    assert {kind: group.kernels for kind, group in groups.items()} == {
        "memory": 14, "collectives": 7
    }  # fmt: skip
    assert sum(group.seconds for group in groups.values()) == 21


def test_on_chip_tpu_memory_is_not_counted_as_traffic():
    """Layouts of a TPU mark on-chip memory by S(1)."""
    text = BY_HAND.replace("%summed = f32[1,100]{1,0}", "%summed = f32[1,100]{1,0:T(1,128)S(1)}")
    assert Program(text).traffic() == Program(BY_HAND).traffic() - 7 * (400 + 400)


def test_known_trip_count_overrides_the_loop_bound():
    noted = 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert Program(BY_HAND.replace("body=%body", noted)).execution_counts["body"] == 3


def test_loop_with_unknown_bound_counts_once():
    assert Program(BY_HAND.replace("direction=LT", "direction=NE")).execution_counts["body"] == 1


@pytest.mark.parametrize(
    ("attributes", "want"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}, x", [[3, 2], [1, 0]]),
        ("source_target_pairs={{0,3},{3,0}}, x", [[0, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_are_parsed_from_every_known_form(attributes, want):
    np.testing.assert_array_equal(replica_groups(attributes, 4), want)


def test_unknown_form_of_replica_groups_is_rejected():
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("replica_groups=<new>", 4)


def test_asynchronous_start_and_done_count_as_one_collective():
    text = """HloModule m, num_partitions=4
ENTRY %main (p: bf16[8]) -> bf16[32] {
  %p = bf16[8]{0} parameter(0)
  %start = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = bf16[32]{0} all-gather-done(%start)
}
"""
    (found,) = Program(text).collectives()
    assert (found.kind, found.times, found.bytes) == ("all-gather", 1, 64 * 3 // 4)
    assert Program(text).kernels().total() == 1


@pytest.mark.parametrize(
    ("start", "sent"),
    [
        ("f32[8]{0} all-reduce-start(%p)", 2 * 32 * 3 // 4),
        ("((f32[8]{0}), f32[8]{0}) all-reduce-start(%p)", 2 * 32 * 3 // 4),  # since jax 0.11
        ("(f32[8]{0}, f32[4]{0}) all-reduce-start(%p, %q)", 2 * 48 * 3 // 4),
        ("((f32[8]{0}, f32[4]{0}), (f32[8]{0}, f32[4]{0})) all-reduce-start(%p, %q)", 72),
        ("((f32[8]{0}), f32[8]{0}) all-to-all-start(%p)", 32 * 3 // 4),
    ],
)
def test_operands_that_a_start_returns_are_not_sent(start, sent):
    text = f"""HloModule m, num_partitions=4
ENTRY %main (p: f32[8], q: f32[4]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %q = f32[4]{{0}} parameter(1)
  ROOT %start = {start}, replica_groups={{}}
}}
"""
    (found,) = Program(text).collectives()
    assert found.bytes == sent


@pytest.mark.parametrize(
    ("result", "operation", "traffic"),
    [
        ("f32[8]{0}", "all-reduce(%p)", 64),
        ("f32[8]{0}", "all-reduce-start(%p)", 64),
        ("((f32[8]{0}), f32[8]{0})", "all-reduce-start(%p)", 64),
        ("f32[32]{0}", "all-gather(%p)", 160),
        ("(f32[8]{0}, f32[32]{0})", "all-gather-start(%p)", 160),
    ],
)
def test_operands_that_a_start_returns_are_not_written(result, operation, traffic):
    text = f"""HloModule m, num_partitions=4
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = {result} {operation}, replica_groups={{}}, dimensions={{0}}
}}
"""
    assert Program(text).traffic() == traffic


OVERLAP = """HloModule m, num_partitions=4
ENTRY %main (a: f32[8], b: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %one = f32[8]{0} all-reduce-start(%a), replica_groups={}, to_apply=%sum
  %two = f32[8]{0} all-reduce-start(%b), replica_groups={}, to_apply=%sum
  %c = f32[8]{0} negate(%a)
  %d = f32[8]{0} negate(%c)
  %one.done = f32[8]{0} all-reduce-done(%one)
  %e = f32[8]{0} negate(%one.done)
  %two.done = f32[8]{0} all-reduce-done(%two)
  %whole = f32[32]{0} all-gather(%two.done), replica_groups={}, dimensions={0}
  %start = (f32[8]{0}, f32[8]{0}) collective-permute-start(%e), source_target_pairs={{0,1},{1,0}}
  %f = f32[8]{0} negate(%e)
  ROOT %done = f32[8]{0} collective-permute-done(%start)
}
"""


@pytest.mark.parametrize(
    ("seconds", "hidden"),
    [
        # the first all-reduce hides behind c and d; the second runs after it, partly behind e
        (2.0, {"all-reduce": 3.0, "all-gather": 0.0, "collective-permute": 1.0}),
        (0.5, {"all-reduce": 1.0, "all-gather": 0.0, "collective-permute": 0.5}),
        (9.0, {"all-reduce": 3.0, "all-gather": 0.0, "collective-permute": 1.0}),
    ],
)
def test_overlap_is_the_time_of_kernels_between_start_and_done(seconds, hidden):
    """Kernels take one second, and collectives run one after the other."""
    found = Program(OVERLAP).overlap(lambda *_: 1.0, lambda _: seconds)
    assert {kind: group.hidden for kind, group in found.items()} == hidden
    calls = {kind: (group.calls, group.asynchronous) for kind, group in found.items()}
    assert calls == {"all-reduce": (2, 2), "all-gather": (1, 0), "collective-permute": (1, 1)}
    assert all(group.seconds == group.calls * seconds for group in found.values())


def test_overlap_of_a_loop_counts_every_turn():
    found = Program(BY_HAND).overlap(lambda *_: 1.0, lambda _: 2.0)
    assert {kind: (o.calls, o.seconds, o.hidden) for kind, o in found.items()} == {
        "all-reduce": (7, 14.0, 0.0)
    }


def test_padding_of_a_tpu_product_counts_no_flops():
    """The window walks over the 3 x 12 heads of the weight, and only one place has no padding."""
    product = """HloModule m
ENTRY %main (x: bf16[8,768,1,1], w: bf16[768,3,12,64]) -> bf16[8,64,3,12] {
  %x = bf16[8,768,1,1]{3,2,1,0} parameter(0)
  %w = bf16[768,3,12,64]{3,2,1,0} parameter(1)
  ROOT %y = bf16[8,64,3,12]{3,2,1,0} convolution(%x, %w), window={size=3x12 pad=2_2x11_11 rhs_reversal=1x1}, dim_labels=bf01_i01o->bf01
}
"""  # noqa: E501
    (group,) = Program(product).breakdown(lambda *_: 0.0).values()
    assert group.flops == 2 * 8 * 768 * (3 * 12 * 64)


def test_collectives_inside_tpu_fusions_are_counted_once():
    """A collective in several fusions counts once; a sliced all-reduce is a reduce-scatter."""
    text = """HloModule m, num_partitions=4
%start (p: bf16[8]) -> bf16[32] {
  %p = bf16[8]{0} parameter(0)
  ROOT %g = bf16[32]{0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}
%carry_on (p.1: bf16[8]) -> bf16[32] {
  %p.1 = bf16[8]{0} parameter(0)
  ROOT %g.1 = bf16[32]{0} all-gather(%p.1), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}
%all-reduce-scatter (p.2: bf16[32], i: s32[]) -> bf16[8] {
  %p.2 = bf16[32]{0} parameter(0)
  %i = s32[] parameter(1)
  %r = bf16[32]{0} all-reduce(%p.2), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %part = bf16[8]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}
ENTRY %main (x: bf16[8], n: s32[]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %a = bf16[32]{0} fusion(%x), kind=kCustom, calls=%start
  %b = bf16[32]{0} fusion(%x), kind=kCustom, calls=%carry_on
  ROOT %c = bf16[8]{0} fusion(%b, %n), kind=kCustom, calls=%all-reduce-scatter
}
"""
    found = {c.kind: (c.times, c.bytes) for c in Program(text).collectives()}
    assert found == {"all-gather": (1, 48), "reduce-scatter": (1, 48)}


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 4096 * 7 // 8),
        ("all-gather", 8 * 4096 * 7 // 8),
        ("reduce-scatter", 4096 * 7 // 8),
        ("collective-permute", 4096),
    ],
)
def test_compiled_collectives_have_expected_kind_count_and_bytes(kind, sent):
    """Each of eight devices has 1024 floats, 4096 bytes, and communicates five times."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    function = {
        "all-reduce": lambda x: jax.lax.psum(x, "x") / 8,
        "all-gather": lambda x: jax.lax.all_gather(x, "x", tiled=True)[1::8],
        "reduce-scatter": lambda x: jnp.tile(jax.lax.psum_scatter(x, "x", tiled=True), 8),
        "collective-permute": lambda x: jax.lax.ppermute(x, "x", [(i, 7 - i) for i in range(8)]),
    }[kind]

    @jax.jit
    @partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"),
        check_vma=False,
    )  # fmt: skip
    def five_times(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: function(jnp.sin(x)), x)

    x = jax.ShapeDtypeStruct((8 * 1024,), jnp.float32)
    found = Program(five_times.lower(x).compile().as_text()).collectives()
    assert {c.kind for c in found} == {kind}
    assert sum(c.times for c in found) == 5
    assert sum(c.times * c.bytes for c in found) == 5 * sent
