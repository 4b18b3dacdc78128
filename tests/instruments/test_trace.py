"""Events, compiled text and phases, worked by hand. A real profile is read in test_run.py."""

from moe_jax.instruments import trace
from moe_jax.instruments.trace import Change
from moe_jax.plan.hlo import scopes

HLO = """HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(step)/jvp(moe)/route/mul"}
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %copy.9 = f32[4]{0} copy(%x)
  ROOT %r = (s32[], f32[4]{0}) tuple(%x, %copy.9)
}

%cond (t.1: (s32[], f32[4])) -> pred[] {
  %t.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused
  %tuple.1 = (s32[], /*index=1*/f32[4]{0}) tuple(%a, %fusion.1)
  %while.1 = (s32[], f32[4]{0}) while(%tuple.1), condition=%cond, body=%body, \
metadata={op_name="jit(s)/transpose(jvp(moe))/experts/while"}
  %copy.1 = f32[4]{0} copy(%a)
  %copy.2 = f32[4]{0} copy(%copy.1)
  ROOT %add.1 = f32[4]{0} add(%a, %copy.2), metadata={op_name="jit(step)/optimizer/add"}
}
"""


def test_an_instruction_without_a_scope_has_that_of_its_surroundings():
    found = scopes.read_instructions(HLO)
    assert found["while.1"].opcode == "while" and found["while.1"].operands == ("tuple.1",)
    assert (
        set(found["while.1"].called) == {"cond", "body"} and found["copy.9"].computation == "body"
    )
    scope = scopes.find_scopes(found)
    assert scope["fusion.1"] == "jit(step)/jvp(moe)/route/mul"  # what it fuses
    assert scope["copy.9"] == "jit(s)/transpose(jvp(moe))/experts/while"  # the loop around it
    assert scope["copy.1"] == "jit(step)/optimizer/add"  # its user's user


def test_phases():
    assert scopes.phase_of("jit(step)/jvp(moe)/route/dot_general") == ("moe/route", "forward")
    assert scopes.phase_of(
        "jit(step)/transpose(jvp(moe))/gather_experts/while/body/dispatch/x"
    ) == (
        "moe/experts",
        "backward",
    )
    assert scopes.phase_of("jit(step)/while/body/checkpoint/moe/combine/add") == ("moe/combine", "")
    assert scopes.phase_of("jit(step)/jvp(attention)/transpose") == ("attention", "forward")
    assert scopes.phase_of("jit(step)/optimizer/transpose(x)") == ("optimizer", "")
    assert scopes.phase_of("jit(step)/transpose(jvp(moe))/psum") == ("moe/other", "backward")
    assert scopes.phase_of("") == ("other", "")


def test_a_loop_does_not_count_its_body_twice():
    events = [(0.0, 10.0, "while"), (1.0, 3.0, "a"), (3.0, 5.0, "b"), (12.0, 13.0, "c")]
    pieces = list(trace.innermost(events))
    assert pieces == [(0, 1, "while"), (1, 3, "a"), (3, 5, "b"), (5, 10, "while"), (12, 13, "c")]


def test_threads_share_a_moment_and_what_is_only_under_way_takes_the_rest():
    # a runs in 0..4 and is under way until 8; b runs beside it in 2..4 and alone in 4..6; nothing
    # from 8 to 9; c in 9..10.
    changes = [
        *(
            Change(0, True, "a", 1),
            Change(0, False, "a", 1),
            Change(4, True, "a", -1),
            Change(8, False, "a", -1),
        ),
        *(
            Change(2, True, "b", 1),
            Change(6, True, "b", -1),
            Change(9, True, "c", 1),
            Change(10, True, "c", -1),
        ),
    ]
    times, idle = trace.share(sorted(changes))
    assert times == {"a": 2 + 1 + 2, "b": 1 + 2, "c": 1} and idle == 1
    assert trace.share([]) == ({}, 0.0)


def test_the_table_adds_up():
    phases = {("moe/route", "forward"): 1.0, ("moe/route", "backward"): 2.0, ("optimizer", ""): 6.0}
    lines = trace.table(trace.Phases(phases, {}, 1.0, 2)).splitlines()
    assert lines[1].split() == ["moe/route", "3.00", "30.0%", "1.00", "2.00"]
    assert lines[2].split() == ["optimizer", "6.00", "60.0%"]
    assert lines[3].split() == ["nothing", "runs", "1.00", "10.0%"]
