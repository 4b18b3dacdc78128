"""Where the time of a step goes: a profiler trace whose instructions carry the phases of the MoE
layer, on a CPU too.

A trace names compiled instructions ("ynn_fusion.65"); the compiled text of the step says which
`jax.named_scope` each comes from. Together: milliseconds of moe/route, moe/dispatch, moe/experts,
moe/combine, attention and optimizer, forward and backward.
"""

import gzip
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from moe_jax.plan.hlo.scopes import Instruction, find_scopes, phase_of, read_instructions

# Instructions in phases.txt.
SLOWEST = 12
# They run other instructions, which have events of their own.
CONTAINERS = ("while", "conditional", "call")


class Profile:
    """The trace of the steps [first, last) that `profile = "first:last"` asks for, of this process
    alone.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: Path):
        self._steps, self._begun = steps or (0, 0), -1
        self._folder = workdir / "profile"
        # Processes that share a workdir would write over each other.
        if jax.process_count() > 1:
            self._folder /= f"process_{jax.process_index()}"

    def begins(self, step: int) -> bool:
        """Returns whether the trace starts before `step`: the first step of the range that this run
        gets to.
        """
        return self._begun < 0 and self._steps[0] <= step < self._steps[1]

    def begin(self, step: int, state: Any) -> None:
        """Starts the trace if it begins before `step`, which runs next."""
        if self.begins(step):
            # No earlier step belongs into it.
            jax.block_until_ready(state)
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
        # The text says which scope each instruction of the trace comes from.
        hlo = step_fn.lower(state, batch).compile().as_text()
        path, phases = write(self._folder, hlo, done - first)
        others = f" (this process; all: {self._folder.parent})" if jax.process_count() > 1 else ""
        return [f"profile of steps {first} to {done - 1}: {path}{others}", table(phases)]

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
    # When the instruction began that is under way: by the number that its end has too.
    under_way: dict[int, tuple[float, str]] = {}
    planes = ProfileData.from_file(str(path)).planes
    threads = (line for plane in planes for line in plane.lines)
    for thread in threads:
        events = []
        for event in thread.events:
            stats = dict(event.stats)
            if "hlo_op" in stats:
                name = str(stats["hlo_op"]) if stats.get("hlo_module") == module else ""
                events.append((event.start_ns, event.end_ns, name))
                # A container's time is that of the instructions that it runs.
                if name in instructions and instructions[name].opcode not in CONTAINERS:
                    under_way[stats.get("_p", 0)] = event.start_ns, name
            elif event.name.startswith("end: ") and stats.get("_c") in under_way:
                # A CPU instruction may leave its work to other threads, which trace nothing,
                # and end long after its event.
                start, name = under_way.pop(stats["_c"])
                end = max(start, event.start_ns)
                changes += [Change(start, False, name, 1), Change(end, False, name, -1)]
        for start, end, name in innermost(events):
            changes += [Change(start, True, name, 1), Change(end, True, name, -1)]
    return sorted(changes)


def innermost(events: list[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Yields the events (start, end, name) of one thread, each without the time of the events
    within it: no time counts twice.
    """
    # Those that are open now, the innermost last: (end, name).
    stack: list[tuple[float, str]] = []
    # Up to here all time is given away.
    at = 0.0
    # Where two begin together, the longer one is around the other. The last event closes all.
    in_order = sorted(events, key=lambda event: (event[0], -event[1]))
    for start, end, name in [*in_order, (math.inf, 0.0, "")]:
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
    # How often each instruction is under way (False), and runs (True).
    active: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for change in changes:
        # The time since the change before, in which nothing began or ended.
        length, at = change.time - at, change.time
        # What runs goes before what is only under way elsewhere.
        sharers = active[True] or active[False]
        if length and sharers:
            each = length / sharers.total()
            for name, count in sharers.items():
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

    # (phase, "forward", "backward" or "").
    phases: dict[tuple[str, str], float]
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
    # The profiler makes a folder for each trace, named by the time.
    traces = directory.glob("plugins/profile/*/*.xplane.pb")
    path = max(traces, key=lambda trace: trace.stat().st_mtime)
    instructions = read_instructions(hlo)
    scopes = find_scopes(instructions)
    # The trace has instructions of other programs too, whose names may be the same.
    header = re.match(r"HloModule ([\w.\-]+)", hlo)
    module = header[1] if header else ""
    times, idle = share(read_changes(path, module, instructions))
    result = add_up(times, idle, scopes, steps)
    (path.parent / "phases.json").write_text(json.dumps(_as_json(result, scopes), indent=1))
    lines = [
        table(result),
        f"\nThe slowest instructions of {steps} step(s), ms a step (all are in phases.json):\n",
    ]
    for name, ms in list(result.instructions.items())[:SLOWEST]:
        if name:
            lines.append(f"{ms:10.2f}  {name:40} {scopes.get(name, '')}")
    (path.parent / "phases.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for trace in path.parent.glob(path.name.replace(".xplane.pb", ".trace.json.gz")):
        annotate(trace, module, scopes)
    return path.parent / "phases.txt", result


def add_up(
    times: Mapping[str, float], idle: float, scopes: Mapping[str, str], steps: int
) -> Phases:
    """Returns the phases of `times`, ns of each instruction in all steps; the slowest comes first.

    The time below the name "" is that of other programs.
    """
    slowest_first = sorted(times.items(), key=lambda item: -item[1])
    per_step = {name: ns / steps / 1e6 for name, ns in slowest_first}
    phases: defaultdict[tuple[str, str], float] = defaultdict(float)
    for name, ms in per_step.items():
        phase = phase_of(scopes.get(name, "")) if name else ("another program", "")
        phases[phase] += ms
    return Phases(dict(sorted(phases.items())), per_step, idle / steps / 1e6, steps)


def _as_json(result: Phases, scopes: Mapping[str, str]) -> dict[str, Any]:
    """Returns the content of phases.json."""
    phases = [
        {"phase": phase, "pass": direction, "ms": ms}
        for (phase, direction), ms in result.phases.items()
    ]
    instructions = {}
    for name, ms in result.instructions.items():
        if name:
            scope = scopes.get(name, "")
            instructions[name] = {"ms": ms, "phase": _words(scope), "scope": scope}
    return {
        "steps": result.steps,
        "idle_ms": result.idle,
        "phases": phases,
        "instructions": instructions,
    }


def _words(scope: str) -> str:
    """Returns the phase and the pass of a scope as one text."""
    return " ".join(phase_of(scope)).strip()


def table(result: Phases) -> str:
    """Returns the phases as text: ms a step, forward and backward, and their share of a step."""
    # A trace may be empty.
    whole = max(sum(result.phases.values()) + result.idle, 1e-9)
    lines = [f"{'phase':16}{'ms a step':>10}{'share':>8}{'forward':>10}{'backward':>10}"]
    for phase in dict.fromkeys(phase for phase, _ in result.phases):
        forward = result.phases.get((phase, "forward"), 0.0)
        backward = result.phases.get((phase, "backward"), 0.0)
        total = forward + backward + result.phases.get((phase, ""), 0.0)
        passes = "".join(f"{ms:10.2f}" if ms else f"{'':10}" for ms in (forward, backward))
        line = f"{phase:16}{total:10.2f}{100 * total / whole:7.1f}%{passes}"
        lines.append(line.rstrip())
    lines.append(f"{'nothing runs':16}{result.idle:10.2f}{100 * result.idle / whole:7.1f}%")
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
            event["name"] = f"{_words(scopes[name])} | {name}"
            args["scope"] = scopes[name]
    # Level 1 is the fastest: traces are long.
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        json.dump(trace, file)
