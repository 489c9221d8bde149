"""Reading compiled programs: texts as the TPU compiler writes them, shortened, counted by hand."""

import numpy as np
import pytest

from instap_jax.aot import compiling, hlo

# A loop of 6, whose body holds a loop from 2 to 8 in steps of 2: the bound is carried along.
LOOPS = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.1: bf16[8,128]) -> bf16[8,128] {
  %param_0.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %tanh.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} tanh(%param_0.1), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%inner_body (param.1: (u32[], bf16[8,128], u32[])) -> (u32[], bf16[8,128], u32[]) {
  %param.1 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=2*/u32[]{:T(128)}) parameter(0)
  %constant.1 = u32[]{:T(128)} constant(1)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%param.1), index=0, metadata={op_name="a(b)"}
  %add.1 = u32[]{:T(128)} add(%get-tuple-element.1, %constant.1)
  %add.2 = u32[]{:T(128)} add(%add.1, %constant.1)
  %get-tuple-element.2 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%param.1), index=1
  %get-tuple-element.3 = u32[]{:T(128)} get-tuple-element(%param.1), index=2
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.2), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(step)/tanh"}, backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %tuple.1 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%add.2, %fusion.1, %get-tuple-element.3)
}

%inner_condition (param.2: (u32[], bf16[8,128], u32[])) -> pred[] {
  %param.2 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=2*/u32[]{:T(128)}) parameter(0)
  %get-tuple-element.4 = u32[]{:T(128)} get-tuple-element(%param.2), index=0
  %get-tuple-element.5 = u32[]{:T(128)} get-tuple-element(%param.2), index=2
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.4, %get-tuple-element.5), direction=LT
}

%body (param.3: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %param.3 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %constant.2 = s32[]{:T(128)} constant(1)
  %constant.3 = u32[]{:T(128)} constant(2)
  %copy.3 = u32[]{:T(128)} copy(%constant.3)
  %constant.4 = u32[]{:T(128)} constant(8)
  %get-tuple-element.6 = s32[]{:T(128)} get-tuple-element(%param.3), index=0
  %add.3 = s32[]{:T(128)} add(%get-tuple-element.6, %constant.2)
  %get-tuple-element.7 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%param.3), index=1
  %tuple.2 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%copy.3, %get-tuple-element.7, %constant.4)
  %while.1 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) while(%tuple.2), condition=%inner_condition, body=%inner_body
  %get-tuple-element.8 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
  %convert.1 = bf16[8,128]{1,0:T(8,128)(2,1)} convert(%get-tuple-element.8), metadata={op_name="jit(step)/convert"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %tuple.3 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%add.3, %convert.1)
}

%condition (param.4: (s32[], bf16[8,128])) -> pred[] {
  %param.4 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %constant.5 = s32[]{:T(128)} constant(6)
  %get-tuple-element.9 = s32[]{:T(128)} get-tuple-element(%param.4), index=0
  ROOT %compare.2 = pred[]{:T(512)} compare(%get-tuple-element.9, %constant.5), direction=LT
}

ENTRY %main (param.5: bf16[8,128]) -> bf16[8,128] {
  %param.5 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.6 = s32[]{:T(128)} constant(0)
  %tuple.4 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%constant.6, %param.5)
  %while.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%tuple.4), condition=%condition, body=%body
  ROOT %get-tuple-element.10 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501 - lines of the compiler


def visits_of(text: str) -> list[hlo.Visit]:
    return list(hlo.walk(hlo.parse(text)))


def test_loops_multiply_and_a_fusion_carries_the_cost_of_its_parts():
    visits = visits_of(LOOPS)
    times = {visit.instruction.name: visit.times for visit in visits}
    assert (times["while.2"], times["while.1"], times["convert.1"]) == (1, 6, 6)
    assert times["fusion.1"] == times["tanh.1"] == 6 * 3
    assert hlo.cycles(visits) == 6 * 100 + 6 * 3 * 10
    assert hlo.hottest(visits, 2) == [(600, "convert"), (180, "tanh")]


KERNEL = """  %splash.1 = (f32[2,640]{1,0}, bf16[8,128]{1,0}) custom-call(%convert.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 640}"
}}, metadata={op_name="jit(step)/splash"}, backend_config={"custom_call_config":{"body":"TUz"},"estimated_cycles":"7"}
"""  # noqa: E501


def test_lines_of_a_kernel_do_not_end_its_computation():
    text = LOOPS.replace("  ROOT %tuple.3", KERNEL + "  ROOT %tuple.3")
    assert text.count("splash.1") == 1
    visits = visits_of(text)
    assert len(visits) == len(visits_of(LOOPS)) + 1
    (kernel,) = (v for v in visits if v.instruction.name == "splash.1")
    assert (kernel.instruction.opcode, kernel.times) == ("custom-call", 6)
    assert hlo.cycles(visits) == hlo.cycles(visits_of(LOOPS)) + 6 * 7


@pytest.mark.parametrize(
    "change, runs",
    [
        (("constant(8)", "constant(9)"), 4),  # 2, 4, 6, 8
        (("direction=LT\n}\n\n%body", "direction=LE\n}\n\n%body"), 4),
        (("direction=LT\n}\n\n%body", "direction=NE\n}\n\n%body"), 3),
        (("copy(%constant.3)", "rng-get-and-update-state()"), None),  # unknown: not a constant
        (("(%param.1), index=0", "(%param.1), index=2"), None),  # steps from another counter
        (("add(%add.1, %constant.1)", "multiply(%add.1, %constant.1)"), None),
    ],
)
def test_trip_counts(change, runs):
    assert change[0] in LOOPS
    module = hlo.parse(LOOPS.replace(*change))
    body = module.computations["body"]
    assert hlo.trip_count(module, body, body.instructions["while.1"]) == runs


def test_text_without_a_program():
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("HloModule nothing\n")


# Devices in another order, as libtpu 0.0.42 names them.
TRANSPOSED = "mesh['a'=1,'b'=4,'c'=1,'d'=2], device_ids=([2,4]T(1,0)) {'b'}"
LINE = '  %x.{n} = {shape} {op}(%p), channel_id={n}, {groups}, metadata={{op_name="jit(step)/(x)"}}'


def entry(*lines: str) -> list[hlo.Visit]:
    return visits_of("\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *lines, "}"]))


@pytest.mark.parametrize(
    "op, shape, groups, amount, axes",
    [
        # A chip has a quarter of the 4096 bytes and receives the rest.
        ("all-gather", "bf16[16,128]{1,0:T(8,128)(2,1)}", "{{0,1,2,3},{4,5,6,7}}", 3072, "fsdp"),
        ("all-gather", "bf16[16,128]", "[2,4]<=[8]", 3072, "fsdp"),
        ("all-gather", "bf16[16,128]", "[4,2]<=[2,4]T(1,0)", 2048, "replica"),
        ("all-gather", "bf16[16,128]", "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 3072, "fsdp"),
        ("all-gather", "bf16[16,128]", "mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", 2048, "replica"),
        ("all-reduce", "(f32[64]{0}, f32[192]{0})", "{{0,1,2,3,4,5,6,7}}", 1792, "replica+fsdp"),
        ("all-reduce", "f32[256]", "{}", 1792, "replica+fsdp"),
        ("reduce-scatter", "f32[256]", "{{0,1,2,3},{4,5,6,7}}", 3072, "fsdp"),
        ("all-to-all", "f32[256]", "{{0,1,2,3},{4,5,6,7}}", 768, "fsdp"),
        ("all-gather", "bf16[16,128]", "mesh['axis_0'=8] {'axis_0':(2)2}", None, "?"),
        ("all-gather", "bf16[16,128]", TRANSPOSED, 3072, "fsdp"),
    ],
)
def test_bytes_and_axes_of_collectives(op, shape, groups, amount, axes):
    visits = entry(LINE.format(n=1, shape=shape, op=op, groups=f"replica_groups={groups}"))
    mesh = {"replica": 2, "fsdp": 4, "tensor": 1}
    (found,) = hlo.collectives(visits, mesh)
    assert (found.kind, found.axes, found.network, found.times) == (op, axes, "ICI", 1)
    assert amount is None or found.bytes == amount


def test_permutation_is_counted_by_what_arrives():
    line = LINE.format(
        n=1,
        shape="(bf16[588,1,64]{0,2,1}, bf16[588,1,64]{0,2,1:T(8,128)(2,1)S(1)}, u32[]{:S(2)})",
        op="collective-permute-start",
        groups="source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
    )
    (found,) = hlo.collectives(entry(line), {"replica": 2, "fsdp": 4, "tensor": 1})
    assert (found.kind, found.axes, found.bytes) == ("collective-permute", "fsdp", 588 * 64 * 2)


def test_a_collective_spread_over_fusions_counts_once():
    text = LOOPS.replace(
        "  ROOT %tanh.1",
        "  %g = bf16[16,128] all-gather(%param_0.1), channel_id=7, replica_groups={{0,1}}\n"
        "  ROOT %tanh.1",
    )
    twice = text.replace(
        "  ROOT %tuple.1 =",
        "  %fusion.2 = bf16[8,128] fusion(%fusion.1), kind=kLoop, calls=%fused_computation.1\n"
        "  ROOT %tuple.1 =",
    )
    assert twice != text
    for one in (text, twice):
        found = hlo.collectives(visits_of(one), {"replica": 1, "fsdp": 2, "tensor": 1})
        assert [(c.times, c.bytes) for c in found] == [(18, 18 * 2048)]


def test_traffic_between_slices():
    megascale = (
        "  %send.1 = (bf16[128,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%b, %a), "
        "channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="
        '"xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    inside = LINE.format(
        n=1, shape="f32[256]", op="reduce-scatter", groups="replica_groups={{0,1},{2,3}}"
    )
    all_of_slice = LINE.format(n=2, shape="f32[256]", op="all-reduce", groups="replica_groups={}")
    # A program is that of one slice: 4 of the 8 devices, of which two share their parameters.
    mesh = {"replica": 4, "fsdp": 2, "tensor": 1}
    visits = entry(megascale, inside, all_of_slice)
    across, within, whole = hlo.collectives(visits, mesh, slices=2)
    assert (across.network, across.kind, across.axes) == ("DCN", "all-reduce", "replica")
    assert across.bytes == 128 * 8 * 128 * 2  # twice the payload, halved
    assert (within.network, within.axes, within.bytes) == ("ICI", "fsdp", 1024)
    assert (whole.axes, whole.bytes) == ("replica+fsdp", 2 * 1024 * 3 / 4)


def test_groups_of_a_named_mesh_in_any_order():
    found = hlo.groups(
        "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", {"replica": 2, "fsdp": 4, "tensor": 1}
    )
    np.testing.assert_array_equal(found, [[0, 1, 4, 5], [2, 3, 6, 7]])


# What a loop offloads, as the text of a compiled program has it and as the compiler's dump does.
OFFLOADED = """HloModule jit_step

%async_computation.1 (param_0.1: bf16[4,8,128], param_1.1: bf16[1,8,128], param_2.1: s32[]) -> bf16[4,8,128] {
  %param_0.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %param_1.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.1 = s32[]{:T(128)} parameter(2)
  ROOT %dynamic-update-slice.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
}

ENTRY %main (param.5: bf16[1,8,128], param.6: bf16[4,8,128]) -> bf16[1,8,128] {
  %param.5 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param.6 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %constant.6 = s32[]{:T(128)} constant(0)
  %buffer.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %dynamic-update-slice-start.1 = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, s32[]), bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) async-start(%buffer.1, %param.5, %constant.6), calls=%async_computation.1
  %dynamic-update-slice-done.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} async-done(%dynamic-update-slice-start.1)
  %dynamic-update-slice-start.2 = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, s32[]), bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%dynamic-update-slice-done.1, %param.5, %constant.6)
  %dynamic-update-slice-done.2 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%dynamic-update-slice-start.2)
  %on-device.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param.6, %constant.6), dynamic_slice_sizes={1,8,128}
  %dynamic-slice-start.1 = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[]), bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) dynamic-slice-start(%dynamic-update-slice-done.2, %constant.6), dynamic_slice_sizes={1,8,128}
  %copy-start.1 = (bf16[4,8,128]{2,1,0:T(8,128)(2,1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) copy-start(%dynamic-update-slice-done.2)
  ROOT %dynamic-slice-done.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%dynamic-slice-start.1)
}
"""  # noqa: E501


def test_traffic_with_the_host():
    module = hlo.parse(OFFLOADED)
    part = 8 * 128 * 2
    moved = hlo.host_traffic(module, list(hlo.walk(module)))
    assert moved == {"out": 2 * part, "in": part + 4 * part}


def test_size_of_shapes():
    assert hlo.size("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4], pred[], s4[8], token[])") == 37


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (39.08G) exceeds available HBM (15.75G). HLO module: jit_step."
)


def test_out_of_memory_message():
    assert compiling.out_of_memory(OUT_OF_MEMORY) == int(39.08 * 2**30)
    assert compiling.out_of_memory("INTERNAL: something else (3.0G)") is None


BUFFERS = """Memory Space: default (color=0)
Total bytes: 41965305344 (39.08GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   25.00GiB( 29%);   25.00GiB;            0;               69; bf16[6,8,4], 2×f32[512,16,197,197]
   32.31GiB( 38%);  588.00MiB;   7851737088;                7; bf16[1024,312,4096], f32[2]
  The rest 962 values are less than 5% of the total size and not shown.

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  171.00MiB(100%);  171.00MiB;            0;                1; u8[1,64,8,256,456,3]
"""


def test_temporaries_are_read_from_the_buffer_assignment():
    assignment = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <30 select.34 @0> (size=512,offset=0): pred[]{:T(512)}
allocation 2: size 262144, page 0, output shape is |f32[128,512]|, maybe-live-out:
allocation 253: size 4096, color 5, page 0, preallocated-temp:
allocation 256: size 2458112, preallocated-temp:
allocation 257: size 18743296, color 1, preallocated-temp:
"""
    assert compiling.temporaries(assignment) == {0: 2458112, 1: 18743296, 5: 4096}
    assert compiling.temporaries("") == {}


def test_largest_buffers():
    assert compiling.largest_buffers(BUFFERS) == [
        (25 << 30, "f32[512,16,197,197], bf16[6,8,4]"),
        (588 << 20, "bf16[1024,312,4096], f32[2]"),
    ]
    assert compiling.largest_buffers("") == []


def test_a_computation_of_another_core_ends_where_it_says_so():
    text = """HloModule jit_step, is_scheduled=true

%async_computation (param_0: bf16[8]) -> bf16[16] {
  %param_0 = bf16[8]{0} parameter(0)
  ROOT %all-gather.1 = bf16[16]{0} all-gather(%param_0), replica_groups={{0,1}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (param: bf16[8]) -> bf16[16] {
  %param = bf16[8]{0} parameter(0)
  %async-start = ((bf16[8]{0}), bf16[16]{0}) async-start(%param), calls=%async_computation
  ROOT %async-done = bf16[16]{0} async-done(%async-start)
}
"""
    visits = hlo.walk(hlo.parse(text))
    assert [one.instruction.opcode for one in visits] == [
        "parameter", "async-start", "parameter", "all-gather", "async-done"
    ]  # fmt: skip
