"""Which `jax.named_scope` each instruction of a compiled program comes from, and which phase of a
step that is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from moe_jax.plan.hlo import text

# From the name of an instruction to its scope path.
Find = Callable[[str], str]
MOE = ("route", "dispatch", "experts", "combine")
# Names that every loop has. "jit(call)" is a block (models/stack.py).
_LOOPS = {
    "while",
    "body",
    "closed_call",
    "checkpoint",
    "rematted_computation",
    "shard_map",
    "jit(call)",
}


class Instruction(NamedTuple):
    """One line of compiled text.

    `computation` is the one in which it stands, `called` are those that it runs. `scope` is ""
    where it is not known.
    """

    opcode: str
    computation: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    scope: str


def read_instructions(hlo: str) -> dict[str, Instruction]:
    """Returns {name: Instruction} of the text of a compiled module
    (`jitted.lower(...).compile().as_text()`).
    """
    return instructions_of(text.read(hlo))


def instructions_of(module: text.Module) -> dict[str, Instruction]:
    """Returns {name: Instruction} of a module."""
    return {
        line.name: Instruction(
            opcode=line.opcode,
            computation=computation,
            operands=line.operands,
            called=tuple(name for _, name in line.called),
            scope=line.scope,
        )
        for computation, lines in module.computations.items()
        for line in lines
    }


def find_scopes(instructions: Mapping[str, Instruction]) -> dict[str, str]:
    """Returns {instruction: scope path}."""
    find = finder(instructions)
    return {name: find(name) for name in instructions}


def finder(instructions: Mapping[str, Instruction]) -> Find:
    """Returns a function from the name of an instruction to its scope path.

    An instruction that the compiler added takes the scope of what it fuses, else of the loop around
    it, of the first instruction that uses it (a copy is made for its user), or of what it uses.
    """
    users: dict[str, list[str]] = {}
    # Of each computation.
    members: dict[str, list[str]] = {}
    # Of each computation.
    callers: dict[str, str] = {}
    for name, instruction in instructions.items():
        members.setdefault(instruction.computation, []).append(name)
        for operand in instruction.operands:
            users.setdefault(operand, []).append(name)
        for called in instruction.called:
            callers[called] = name

    def fused(name: str) -> str:
        # The last instruction of a fusion makes its result.
        for called in instructions[name].called:
            for member in reversed(members.get(called, ())):
                if instructions[member].scope:
                    return instructions[member].scope
        return ""

    def nearest(name: str, neighbours: Callable[[str], Iterable[str]]) -> str:
        """Returns the first scope that a breadth-first search from `name` finds."""
        visited, edge = {name}, [name]
        while edge:
            reached = [other for at in edge for other in neighbours(at) if other in instructions]
            # A dict keeps their order: the result must not depend on hashes.
            edge = [other for other in dict.fromkeys(reached) if other not in visited]
            visited.update(edge)
            for other in edge:
                if instructions[other].scope:
                    return instructions[other].scope
        return ""

    def find(name: str) -> str:
        own = instructions[name]
        if own.scope:
            return own.scope
        # The loop, or whatever else runs the computation in which it stands.
        around = nearest(name, lambda at: [callers.get(instructions[at].computation, "")])
        # A loop of the whole step says no phase: then a neighbour knows better.
        says_phase = phase_of(around)[0] != "other"
        return (
            fused(name)
            or (around if says_phase else "")
            or nearest(name, lambda at: users.get(at, ()))
            or nearest(name, lambda at: instructions[at].operands)
            or around
        )

    return find


def short(scope: str) -> str:
    """Returns what says most of a scope: its last names, without those that every loop has."""
    names = [name for name in scope.split("/") if name not in _LOOPS]
    backward = "backward " if "transpose(" in scope else ""
    again = "again " if "rematted_computation" in scope else ""
    return f"{backward}{again}{'/'.join(names[-3:])}"


def phase_of(scope: str) -> tuple[str, str]:
    """Returns the phase and the pass of a scope.

    "jit(step)/transpose(jvp(moe))/experts/cond/dot" -> ("moe/experts", "backward"). What
    rematerialisation computes again counts as backward. The optimizer has no passes: ("optimizer",
    "").
    """
    # With the names inside of "jvp(...)" and "transpose(...)".
    parts = re.split(r"[/()]+", scope)
    if "optimizer" in parts:
        return "optimizer", ""
    # jax differentiates by jvp, and transposes that for the backward pass.
    if "transpose(" in scope:
        direction = "backward"
    else:
        direction = "forward" if "jvp(" in scope else ""
    if "moe" in parts:
        inner = [part.removeprefix("gather_") for part in parts[parts.index("moe") + 1 :]]
        phase = next((part for part in inner if part in MOE), "other")
        return f"moe/{phase}", direction
    return ("attention" if "attention" in parts else "other"), direction
