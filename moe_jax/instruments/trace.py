"""Where the time of a step goes: a profiler trace whose instructions carry the phases of the MoE
layer, on a CPU too.

A trace names compiled instructions ("ynn_fusion.65"); the compiled text of the step says which
`jax.named_scope` each comes from. Together: milliseconds of moe/route, moe/dispatch, moe/experts,
moe/combine, attention and optimizer, forward and backward.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from moe_jax.instruments.scopes import Instruction, find_scopes, phase_of, read_instructions

SLOWEST = 12  # instructions in phases.txt
# They run other instructions, which have events of their own.
CONTAINERS = ("while", "conditional", "call")


class Profile:
    """The trace of the steps [first, last) that `profile = "first:last"` asks for, of this process
    alone.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: Path):
        self._steps, self._begun = steps or (0, 0), -1
        several = jax.process_count() > 1
        self._folder = workdir / "profile" / (f"process_{jax.process_index()}" if several else "")

    def begins(self, step: int) -> bool:
        """Returns whether the trace starts before `step`: the first step of the range that this run
        gets to.
        """
        return self._begun < 0 and self._steps[0] <= step < self._steps[1]

    def begin(self, step: int, state: Any) -> None:
        """Starts the trace if it begins before `step`, which runs next."""
        if self.begins(step):
            jax.block_until_ready(state)  # no earlier step belongs into it
            jax.profiler.start_trace(self._folder)
            self._begun = step

    def ends(self, done: int, last: bool) -> bool:
        """Returns whether the trace ends after `done` steps: with its range or with the run."""
        return self._begun >= 0 and (done == self._steps[1] or last)

    def end(self, done: int, last: bool, step_fn: Any, state: Any, batch: Any) -> list[str]:
        """Ends the trace if the step before `done` was the last of the range or of the run.

        Args:
          step_fn: the jitted step, whose next arguments are `state` and `batch`: it was compiled
              long ago, so that its text takes milliseconds.

        Returns what to show: nothing, or where the profile is and its table.
        """
        if not self.ends(done, last):
            return []
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        first, self._begun, self._steps = self._begun, -1, (0, 0)
        where, phases = write(
            self._folder, step_fn.lower(state, batch).compile().as_text(), done - first
        )
        others = f" (this process; all: {self._folder.parent})" if jax.process_count() > 1 else ""
        return [f"profile of steps {first} to {done - 1}: {where}{others}", table(phases)]

    def close(self) -> None:
        """Drops a trace that a mistake cut short."""
        if self._begun >= 0:
            jax.profiler.stop_trace()
            self._begun = -1


# ---- The trace


class Change(NamedTuple):
    """At `time` (ns) an instruction begins (`by` = 1) or ends (-1) to run on a thread, or to be
    under way on others.
    """

    time: float
    running: bool
    name: str
    by: int


def read_changes(path: Path, module: str, instructions: Mapping[str, Instruction]) -> list[Change]:
    """Returns what happens in a trace (*.xplane.pb), in order.

    Instructions of other modules have the name "".
    """
    changes: list[Change] = []
    begun: dict[int, tuple[float, str]] = {}
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    name = str(stats["hlo_op"]) if stats.get("hlo_module") == module else ""
                    events.append((event.start_ns, event.end_ns, name))
                    if name in instructions and instructions[name].opcode not in CONTAINERS:
                        begun[stats.get("_p", 0)] = event.start_ns, name
                elif event.name.startswith("end: ") and stats.get("_c") in begun:
                    # A CPU instruction may leave its work to other threads, which trace nothing,
                    # and end long after its event.
                    start, name = begun.pop(stats["_c"])
                    changes += [
                        Change(start, False, name, 1),
                        Change(max(start, event.start_ns), False, name, -1),
                    ]
            for start, end, name in innermost(events):
                changes += [Change(start, True, name, 1), Change(end, True, name, -1)]
    return sorted(changes)


def innermost(events: list[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Yields the events (start, end, name) of one thread, each without the time of the events
    within it: no time counts twice.
    """
    stack: list[tuple[float, str]] = []
    at = 0.0
    for start, end, name in [*sorted(events, key=lambda e: (e[0], -e[1])), (float("inf"), 0.0, "")]:
        while stack and stack[-1][0] <= start:
            outer_end, outer = stack.pop()
            if outer_end > at:
                yield at, outer_end, outer
                at = outer_end
        if stack and start > at:
            yield at, start, stack[-1][1]
        at = start
        stack.append((end, name))


def share(changes: list[Change]) -> tuple[dict[str, float], float]:
    """Returns {name: ns}, and the ns in which nothing runs; together the time from the first change
    to the last.

    Instructions that run at the same moment, on several threads or devices, share it evenly; those
    that are only under way share what is left.
    """
    times: defaultdict[str, float] = defaultdict(float)
    idle, at = 0.0, changes[0].time if changes else 0.0
    active: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for change in changes:
        length, at = change.time - at, change.time
        now = active[True] or active[False]
        if length and now:
            each = length / now.total()
            for name, count in now.items():
                times[name] += count * each
        elif length:
            idle += length
        counter = active[change.running]
        counter[change.name] += change.by
        if not counter[change.name]:
            del counter[change.name]
    return dict(times), idle


# ---- What is written


class Phases(NamedTuple):
    """Milliseconds per step. Over the phases and `idle` they add up to the whole time of a step."""

    phases: dict[tuple[str, str], float]  # (phase, "forward", "backward" or "")
    instructions: dict[str, float]
    idle: float
    steps: int


def write(directory: Path, hlo: str, steps: int) -> tuple[Path, Phases]:
    """Writes phases.json and phases.txt beside the newest trace below `directory`, and the scopes
    into the trace.

    Args:
      directory: as given to `jax.profiler.start_trace`.
      hlo: compiled text of the step.
      steps: the number that were traced.

    Returns the path of phases.txt, and the phases.
    """
    path = max(directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    instructions = read_instructions(hlo)
    scopes = find_scopes(instructions)
    module = re.match(r"HloModule ([\w.\-]+)", hlo)
    times, idle = share(read_changes(path, module[1] if module else "", instructions))
    per_step = {
        name: ns / steps / 1e6 for name, ns in sorted(times.items(), key=lambda item: -item[1])
    }
    phases: defaultdict[tuple[str, str], float] = defaultdict(float)
    for name, ms in per_step.items():
        phases[phase_of(scopes.get(name, "")) if name else ("another program", "")] += ms
    result = Phases(dict(sorted(phases.items())), per_step, idle / steps / 1e6, steps)
    (path.parent / "phases.json").write_text(json.dumps(_rows(result, scopes), indent=1))
    lines = [
        f"{ms:10.2f}  {name:40} {scopes.get(name, '')}"
        for name, ms in [*per_step.items()][:SLOWEST]
        if name
    ]
    text = [
        table(result),
        f"\nThe slowest instructions of {steps} step(s), ms a step (all are in phases.json):\n",
        *lines,
    ]
    (path.parent / "phases.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    for trace in path.parent.glob(path.name.replace(".xplane.pb", ".trace.json.gz")):
        annotate(trace, module[1] if module else "", scopes)
    return path.parent / "phases.txt", result


def _rows(result: Phases, scopes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "idle_ms": result.idle,
        "phases": [
            {"phase": phase, "pass": way, "ms": ms} for (phase, way), ms in result.phases.items()
        ],
        "instructions": {
            name: {
                "ms": ms,
                "phase": " ".join(phase_of(scopes.get(name, ""))).strip(),
                "scope": scopes.get(name, ""),
            }
            for name, ms in result.instructions.items()
            if name
        },
    }


def table(result: Phases) -> str:
    """Returns the phases as text: ms a step, forward and backward, and their share of a step."""
    whole = sum(result.phases.values()) + result.idle
    lines = [f"{'phase':16}{'ms a step':>10}{'share':>8}{'forward':>10}{'backward':>10}"]
    for phase in dict.fromkeys(phase for phase, _ in result.phases):
        ms = {way: result.phases.get((phase, way), 0.0) for way in ("forward", "backward", "")}
        ways = "".join(
            f"{ms[way]:10.2f}" if ms[way] else f"{'':10}" for way in ("forward", "backward")
        )
        total = sum(ms.values())
        lines.append(
            f"{phase:16}{total:10.2f}{100 * total / max(whole, 1e-9):7.1f}%{ways}".rstrip()
        )
    lines.append(
        f"{'nothing runs':16}{result.idle:10.2f}{100 * result.idle / max(whole, 1e-9):7.1f}%"
    )
    return "\n".join(lines)


def annotate(path: Path, module: str, scopes: Mapping[str, str]) -> None:
    """Puts the phase in front of the name of each instruction of a *.trace.json.gz, and its scope
    among the arguments: for Perfetto.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    for event in trace["traceEvents"]:
        args = event.get("args", {})
        name = args.get("hlo_op", "")
        if args.get("hlo_module") == module and name in scopes:
            event["name"] = f"{' '.join(phase_of(scopes[name])).strip()} | {name}"
            args["scope"] = scopes[name]
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        json.dump(trace, file)
