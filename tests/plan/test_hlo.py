"""What is read of a compiled program, against texts that are counted by hand."""

import pytest

from moe_jax.plan.hlo import collectives, memory_traffic, products, program, scopes, text

# A loop of five trips around a product of [4, 8] and [8, 16] and a sum over two devices; behind it
# a branch with a product of its own.
LOOP = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], f32[4,8], f32[8,16])) -> (s32[], f32[4,8], f32[8,16]) {
  %carry = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  %a = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %b = f32[8,16]{1,0} get-tuple-element(%carry), index=2
  %dot.1 = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(step)/jvp(moe)/experts/dot_general"}
  %all-reduce.1 = f32[4,16]{1,0} all-reduce(%dot.1), replica_groups={{0,1},{2,3}}, to_apply=%add, \
metadata={op_name="jit(step)/moe/combine/psum"}
  ROOT %tuple = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) tuple(%carry)
}

%condition (carry: (s32[], f32[4,8], f32[8,16])) -> pred[] {
  %carry = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%skip (x: f32[4,8]) -> f32[4,8] {
  ROOT %x = f32[4,8]{1,0} parameter(0)
}

%run (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %dot.2 = f32[4,8]{1,0} dot(%x, %x), lhs_contracting_dims={}, rhs_contracting_dims={}
}

ENTRY %main (p: (s32[], f32[4,8], f32[8,16]), i: s32[]) -> f32[4,8] {
  %p = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) parameter(0)
  %which = s32[] parameter(1)
  %while.1 = (s32[], f32[4,8]{1,0}, f32[8,16]{1,0}) while(%p), condition=%condition, body=%body
  %x = f32[4,8]{1,0} get-tuple-element(%while.1), index=1
  ROOT %conditional.1 = f32[4,8]{1,0} conditional(%which, %x, %x), \
branch_computations={%skip, %run}
}
"""
LENGTHS = {"data": 2, "expert": 2}


def test_a_body_counts_as_often_as_its_loop_runs():
    read = program.read(LOOP, LENGTHS)
    assert read.products.flops == {"routed experts": 5 * 2 * 4 * 16 * 8}
    assert read.unknown_loops == ()


def test_of_branches_the_shortest_runs_and_the_worst_load_takes_the_longest():
    read = program.read(LOOP, LENGTHS)
    assert read.most_flops - read.products.flops.total() == 2 * 4 * 8


def test_a_trip_count_that_is_written_goes_before_the_condition():
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    runs = text.count_runs(text.read(known))
    assert runs.times["body"] == 7


def test_a_loop_whose_length_depends_on_the_data_counts_once_and_is_named():
    unknown = LOOP.replace("constant(5)", "get-tuple-element(%carry), index=0")
    unknown = unknown.replace("body=%body", 'body=%body, metadata={op_name="moe/experts/while"}')
    runs = text.count_runs(text.read(unknown))
    assert runs.times["body"] == 1 and runs.unknown_loops == ("moe/experts/while",)


def test_the_loop_of_the_experts_runs_as_often_as_their_load_asks_for():
    unknown = LOOP.replace("constant(5)", "get-tuple-element(%carry), index=0")
    of_experts = unknown.replace("body=%body", 'body=%body, metadata={op_name="moe/experts/while"}')
    once = program.read(of_experts, LENGTHS).products.flops.total()
    found = program.read(of_experts, LENGTHS, program.Rounds(3, 6))
    assert found.unknown_loops == ()
    (count,) = [one.count for one in found.collectives]
    assert count == 3 and found.most_flops > found.products.flops.total() > once
    other = unknown.replace("body=%body", 'body=%body, metadata={op_name="moe/route/while"}')
    found = program.read(other, LENGTHS, program.Rounds(3, 6))
    assert found.unknown_loops == ("moe/route/while",)


def test_an_all_reduce_passes_a_device_twice():
    (found,) = program.read(LOOP, LENGTHS).collectives
    # [4, 16] in float32 among two devices, five times: a half is received, twice.
    assert found.num_bytes == 5 * 4 * 16 * 4 and found.count == 5
    assert (found.axes, found.group, found.cargo) == ("expert", 2, "tokens")
    assert not found.is_async


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("replica_groups={{0,4},{1,5}}", [0, 4]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_are_read_however_they_are_written(written, devices):
    assert collectives.first_group(written, {"data": 4, "expert": 2}) == devices


COLLECTIVE = """\
HloModule m

ENTRY %main (p: f32[8,2]) -> f32[32,2] {{
  %p = f32[8,2]{{1,0}} parameter(0)
  ROOT %c = {type} {kind}(%p), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}
"""


@pytest.mark.parametrize(
    ("kind", "of_type", "received", "is_async"),
    [
        ("all-gather", "f32[32,2]{1,0}", 3 * 64, False),
        ("all-gather-start", "(f32[8,2]{1,0}, f32[32,2]{1,0})", 3 * 64, True),
        ("reduce-scatter", "f32[2,2]{1,0}", 3 * 16, False),
        ("all-to-all", "f32[8,2]{1,0}", 3 * 16, False),
    ],
)
def test_of_n_parts_a_device_receives_all_but_its_own(kind, of_type, received, is_async):
    read = text.read(COLLECTIVE.format(type=of_type, kind=kind))
    (found,) = collectives.find(read, text.count_runs(read), {"data": 4})
    assert (found.num_bytes, found.is_async) == (received, is_async)


def one_collective(line):
    parameter = "%p = f32[1024]{0} parameter(0)"
    return (
        f"HloModule m\n\nENTRY %main (p: f32[1024]) -> f32[4096] {{\n  {parameter}\n  {line}\n}}\n"
    )


@pytest.mark.parametrize(
    ("groups", "far"),
    [
        # Within slices, across them, and all devices together: of three others two are far.
        ("{{0,1},{2,3}}", 0),
        ("{{0,2},{1,3}}", 4096),
        ("{{0,1,2,3}}", 2 * 4096),
    ],
)
def test_what_comes_from_other_slices_is_counted_by_groups(groups, far):
    size = 1024 * (4 if groups.count("{") == 2 else 2)
    line = f"ROOT %g = f32[{size}]{{0}} all-gather(%p), replica_groups={groups}, dimensions={{0}}"
    read = text.read(one_collective(line))
    runs = text.count_runs(read)
    (found,) = collectives.find(read, runs, {"data": 1, "expert": 4}, [0, 0, 1, 1])
    assert found.far == far and found.num_bytes == 4 * size - 4096
    assert collectives.find(read, runs, {"data": 1, "expert": 4})[0].far == 0


# What libtpu makes of a gather over two slices, shortened: a message between slices, of which each
# device gives 4 KiB, and a gather of both parts within a slice.
SLICES = """\
HloModule m

ENTRY %main (p: f32[1024]) -> f32[4096] {
  %p = f32[1024]{0} parameter(0)
  %token = token[] after-all()
  %recv = (f32[2048]{0:T(1024)}, u32[], token[]) recv(%token), channel_id=1, \
is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="g_0",_xla_megascale_transfer_type="ALL_GATHER"}
  %send = (f32[1024]{0:T(1024)}, u32[], token[]) send(%p, %token), channel_id=2, \
is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="g_0",_xla_megascale_transfer_type="ALL_GATHER"}
  %done = (f32[2048]{0:T(1024)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %both = f32[2048]{0:T(1024)} get-tuple-element(%done), index=0
  ROOT %all = f32[4096]{0:T(1024)} all-gather(%both), replica_groups={{0,1}}, dimensions={0}, \
metadata={op_name="jit(f)/moe/dispatch/all_gather"}
}
"""


def test_messages_between_tpu_slices_are_counted():
    read = text.read(SLICES)
    lengths = {"data": 2, "expert": 2}
    within, message = collectives.find(read, text.count_runs(read), lengths, [0, 0, 1, 1])
    assert message == ("all-gather", "data", 2, "tokens", True, 1, 4096, 4096)
    # The program is that of one slice, in which `expert` lies.
    assert within == ("all-gather", "expert", 2, "tokens", False, 1, 8192, 0)


def test_a_ragged_exchange_counts_what_is_sent_when_the_load_is_balanced():
    """Buffers that receive are larger than that: 1024 of 2048 numbers, from three of four."""
    line = (
        "%o = f32[2048]{0} parameter(1)\n  %s = s32[4]{0} parameter(2)\n  ROOT %r = f32[2048]{0} "
        "ragged-all-to-all(%p, %o, %s, %s, %s, %s), replica_groups={{0,1,2,3}}"
    )
    read = text.read(one_collective(line))
    (found,) = collectives.find(read, text.count_runs(read), {"expert": 4})
    assert found.num_bytes == 4096 * 3 // 4 and found.kind == "ragged-all-to-all"


def test_an_asynchronous_all_to_all_of_a_tpu_counts():
    """Its result is a tuple of tuples, with the tiles of layouts in them."""
    line = (
        "%s = ((f32[4,256]{1,0:T(8,128)(2,1)}), f32[4,256]{1,0:T(8,128)}, u32[]{:S(2)}) "
        "all-to-all-start(%p), replica_groups={{0,1,2,3}}\n  ROOT %d = f32[4,256]{1,0} "
        "all-to-all-done(%s)"
    )
    read = text.read(one_collective(line))
    (found,) = collectives.find(read, text.count_runs(read), {"expert": 4})
    assert found.is_async and found.num_bytes == 4096 * 3 // 4


def test_a_fused_collective_of_a_tpu_counts_where_it_starts():
    fused = """\
HloModule m

%async_collective_fusion.1 (p: f32[8,2]) -> f32[32,2] {
  %p = f32[8,2]{1,0} parameter(0)
  ROOT %g1 = f32[32,2]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}

%begin (p: f32[8,2]) -> f32[32,2] {
  %p = f32[8,2]{1,0} parameter(0)
  %start = f32[8,2]{1,0} custom-call(%p), custom_call_target="AsyncCollectiveStart"
  ROOT %g2 = f32[32,2]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (p: f32[8,2]) -> f32[32,2] {
  %p = f32[8,2]{1,0} parameter(0)
  %f = f32[32,2]{1,0} fusion(%p), kind=kCustom, calls=%begin
  ROOT %g = f32[32,2]{1,0} fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
}
"""
    read = text.read(fused)
    (found,) = collectives.find(read, text.count_runs(read), {"data": 4})
    assert found.is_async and found.count == 1


def scope_of(module):
    return scopes.finder(scopes.instructions_of(module))


def flops_of(line, *parameters):
    """FLOPs of one instruction of parameters of these types."""
    declared = [f"  %p{i} = {kind} parameter({i})" for i, kind in enumerate(parameters)]
    lines = ["HloModule m", "", "ENTRY %main () -> f32[] {", *declared, f"  ROOT {line}", "}"]
    read = text.read("\n".join(lines))
    return products.count(read, text.count_runs(read), scope_of(read))


@pytest.mark.parametrize(
    ("line", "parameters", "flops"),
    [
        # A product [4, 8] x [8, 16] as a TPU writes it.
        (
            "%c = f32[4,16]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf",
            ("f32[4,8]{1,0}", "f32[8,16]{1,0}"),
            2 * 4 * 8 * 16,
        ),
        # Three products [4, 8] x [8, 16]: the batch is a spatial dimension, dilated so that each
        # meets its own.
        (
            "%c = f32[3,4,16]{2,1,0} convolution(%p0, %p1), window={size=3 pad=2_2 stride=1 "
            "lhs_dilate=3 rhs_dilate=2}, dim_labels=0bf_0io->0bf",
            ("f32[3,4,8]{2,1,0}", "f32[3,8,16]{2,1,0}"),
            None,
        ),
        (
            '%c = bf16[4,16]{1,0} custom-call(%p0, %p1), custom_call_target="__cublas$gemm", '
            'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}',
            ("bf16[4,8]{1,0}", "bf16[8,16]{1,0}"),
            2 * 4 * 8 * 16,
        ),
        # Rows of all experts times [e, D, F]: each row once.
        (
            "%ragged-dot.1 = bf16[64,16]{1,0} custom-call(%p0, %p1, %p2), "
            'custom_call_target="tpu_custom_call"',
            ("bf16[64,8]{1,0}", "bf16[2,8,16]{2,1,0}", "s32[2]{0}"),
            2 * 64 * 8 * 16,
        ),
        (
            '%kernel.3 = bf16[64,16]{1,0} custom-call(%p0), custom_call_target="tpu_custom_call", '
            'backend_config={"custom_call_config":{"cost_estimate":{"flops":"123"}}}',
            ("bf16[64,8]{1,0}",),
            123,
        ),
    ],
)
def test_products_of_every_platform(line, parameters, flops):
    found = flops_of(line, *parameters)
    assert not found.unknown
    if flops is not None:
        assert found.flops.total() == flops
    else:
        assert 0 < found.flops.total() < 3 * 3 * 2 * 4 * 8 * 16


def test_of_a_kernel_that_says_nothing_the_part_is_known():
    line = '%splash.7 = bf16[4]{0} custom-call(%p0), custom_call_target="tpu_custom_call"'
    assert flops_of(line, "bf16[4]{0}").unknown == {"other": 1}
    line += ', metadata={op_name="jit(step)/jvp(attention)/pallas_call"}'
    assert flops_of(line, "bf16[4]{0}").unknown == {"attention scores": 1}
    line = '%kernel.7 = bf16[4]{0} custom-call(%p0), custom_call_target="mosaic_gpu_v2"'
    assert flops_of(line, "bf16[4]{0}").unknown == {"other": 1}


def test_a_fusion_reads_a_slice_of_what_it_slices():
    fused = """\
HloModule m

%slice_of (w: f32[32,100], i: s32[]) -> f32[1,100] {
  %w = f32[32,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = f32[1,100]{1,0} dynamic-slice(%w, %i, %zero), dynamic_slice_sizes={1,100}
}

ENTRY %main (w: f32[32,100], i: s32[], v: f32[10]) -> f32[1,100] {
  %w = f32[32,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[10]{0:T(128)S(1)} parameter(2)
  %near = f32[10]{0:T(128)S(1)} negate(%v)
  ROOT %f = f32[1,100]{1,0} fusion(%w, %i), kind=kLoop, calls=%slice_of
}
"""
    read = text.read(fused)
    # 400 bytes read and written, and the counter; nothing for what lies on the chip.
    traffic = memory_traffic.count(read, text.count_runs(read), scope_of(read))
    assert traffic.total() == 804
