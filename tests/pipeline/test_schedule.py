"""The works of a pipeline, counted one by one: what each needs is there, and the bubble is that of
the formula.
"""

import itertools
import re
from pathlib import Path

import pytest

from moe_jax.pipeline.schedule import GPIPE, ONE_F_ONE_B, Schedule

SIZES = [(2, 2, 1), (2, 8, 1), (4, 8, 1), (2, 4, 2), (4, 8, 2), (4, 4, 3), (3, 9, 2)]


def works(schedule, name):
    """(tick, stage, "F" or "B", micro-batch, chunk) of every work of a backward pass, forward works
    first where a tick has both. The forward works of "gpipe" are those of the forward pass.
    """
    found = []
    phases = schedule.phases(name)
    if name == GPIPE:
        for tick, stage in itertools.product(range(schedule.ticks), range(schedule.stages)):
            found.append((tick, stage, "F", schedule.forward(tick, stage)))
    begin = schedule.ticks if name == GPIPE else 0
    first = schedule.first_backward(name)
    for phase in phases:
        for tick in range(phase.first, phase.first + phase.ticks):
            for stage in range(schedule.stages):
                if phase.forward:
                    found.append((tick, stage, "F", schedule.forward(tick, stage)))
                if phase.backward:
                    work = schedule.backward(tick - first, stage)
                    found.append((begin + tick, stage, "B", work))
    return [
        (tick, stage, kind, work.group * schedule.stages + work.member, work.chunk)
        for tick, stage, kind, work in found
        if work.valid
    ]


@pytest.mark.parametrize("name", [GPIPE, ONE_F_ONE_B])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_work_has_what_it_needs(sizes, name):
    schedule = Schedule(*sizes)
    p, m, v = sizes
    when = {}
    for tick, stage, kind, micro, chunk in works(schedule, name):
        place = chunk * p + stage
        assert (kind, micro, place) not in when
        when[kind, micro, place] = tick
        if kind == "F" and place:
            # What the neighbour sent in the tick before.
            assert when["F", micro, place - 1] == tick - 1
        if kind == "B":
            assert when["F", micro, place] <= tick
        if kind == "B" and place < p * v - 1:
            assert when["B", micro, place + 1] == tick - 1
    assert len(when) == 2 * m * v * p


@pytest.mark.parametrize("name", [GPIPE, ONE_F_ONE_B])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_bubble_is_that_of_the_formula(sizes, name):
    """Counted: the slots of all ticks, of which works fill some."""
    schedule = Schedule(*sizes)
    p, m, v = sizes
    phases = schedule.phases(name)
    slots = {
        "F": sum(phase.ticks for phase in phases if phase.forward),
        "B": sum(phase.ticks for phase in phases if phase.backward),
    }
    if name == GPIPE:
        slots["F"] = schedule.ticks
    for kind, count in slots.items():
        done = [work for work in works(schedule, name) if work[1] == 0 and work[2] == kind]
        assert count - len(done) == p - 1
        assert 1 - len(done) / count == pytest.approx((p - 1) / (m * v + p - 1))
    assert schedule.bubble == pytest.approx((p - 1) / (m * v + p - 1))


@pytest.mark.parametrize("sizes", SIZES)
def test_1f1b_keeps_few_inputs(sizes):
    """Between a forward work and its backward one, no other is kept in its place."""
    schedule = Schedule(*sizes)
    p, _, _ = sizes
    kept, most = {}, 0
    for tick, stage, kind, micro, chunk in works(schedule, ONE_F_ONE_B):
        group, member = divmod(micro, p)
        number = group * schedule.round + chunk * p + member
        slot = stage, number % schedule.in_flight
        if kind == "F":
            assert slot not in kept, tick
            kept[slot] = number
            most = max(most, len(kept) if p == 1 else sum(s == stage for s, _ in kept))
        else:
            assert kept.pop(slot) == number
    assert not kept
    assert most <= schedule.in_flight
    assert schedule.kept(GPIPE) == schedule.works


@pytest.mark.parametrize("name", [GPIPE, ONE_F_ONE_B])
@pytest.mark.parametrize("sizes", SIZES)
def test_micro_batches_leave_and_reach_their_stages(sizes, name):
    """What is fed goes down one stage a tick, and so does what is finished (pipeline/ring.py)."""
    schedule = Schedule(*sizes)
    p, _, v = sizes
    for tick, stage, kind, micro, chunk in works(schedule, name):
        group, member = divmod(micro, p)
        if (kind, stage, chunk) == ("F", 0, 0):
            # Loaded in a tick that begins a round, and passed on since.
            assert tick == group * schedule.round + member
        if (kind, stage, chunk) == ("F", p - 1, v - 1):
            end = schedule.round + p - 2 + group * schedule.round
            assert end - tick == p - 1 - member


def test_the_table_of_the_docs_is_that_of_the_schedules():
    page = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text()
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+)% \| (\d+) \| (\d+) \|", page, re.M
    )
    assert len(rows) >= 5
    for *sizes, ticks, bubble, gpipe, one_f_one_b in rows:
        schedule = Schedule(*map(int, sizes))
        assert schedule.ticks == int(ticks), sizes
        assert f"{100 * schedule.bubble:.1f}" == bubble, sizes
        assert schedule.kept(GPIPE) == int(gpipe), sizes
        assert schedule.kept(ONE_F_ONE_B) == int(one_f_one_b), sizes
