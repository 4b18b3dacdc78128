"""Which `jax.named_scope` each instruction of a compiled program comes from, and which phase of a
step that is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

MOE = ("route", "dispatch", "experts", "combine")


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
    found: dict[str, Instruction] = {}
    computation = ""
    for line in hlo.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            computation = header[1]
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if not match:
            continue
        body, _, rest = line[match.end() :].partition(", metadata={")
        opcode = re.search(r"(?:^| )([a-z][\w\-]*)\(", body)
        scope = re.search(r'op_name="((?:[^"\\]|\\.)*)"', rest)
        called = re.findall(
            r"\b(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)", body
        )
        for branches in re.findall(r"branch_computations=\{(.*?)\}", body):
            called += re.findall(r"[\w.\-]+", branches)
        operands = (name for name in re.findall(r"%([\w.\-]+)", body) if name not in called)
        found[match[1]] = Instruction(
            opcode[1] if opcode else "",
            computation,
            tuple(operands),
            tuple(called),
            scope[1] if scope else "",
        )
    return found


def find_scopes(instructions: Mapping[str, Instruction]) -> dict[str, str]:
    """Returns {instruction: scope path}.

    An instruction that the compiler added takes the scope of what it fuses, else of the loop around
    it, of the first instruction that uses it (a copy is made for its user), or of what it uses.
    """
    users: dict[str, list[str]] = {}
    inside: dict[str, list[str]] = {}
    callers = {called: name for name, i in instructions.items() for called in i.called}
    for name, instruction in instructions.items():
        inside.setdefault(instruction.computation, []).append(name)
        for operand in instruction.operands:
            users.setdefault(operand, []).append(name)

    def nearest(name: str, step: Callable[[str], Iterable[str]]) -> str:
        seen, edge = {name}, [name]
        while edge:
            nexts = dict.fromkeys(
                other for at in edge for other in step(at) if other in instructions
            )
            edge = [other for other in nexts if other not in seen]
            seen.update(edge)
            for other in edge:
                if instructions[other].scope:
                    return instructions[other].scope
        return ""

    def find(name: str) -> str:
        own = instructions[name]
        if own.scope:
            return own.scope
        fused = (
            instructions[n].scope for called in own.called for n in reversed(inside.get(called, ()))
        )
        around = nearest(name, lambda at: [callers.get(instructions[at].computation, "")])
        return (
            next((scope for scope in fused if scope), "")
            or (around if phase_of(around)[0] != "other" else "")
            or nearest(name, lambda at: users.get(at, ()))
            or nearest(name, lambda at: instructions[at].operands)
            or around
        )

    return {name: find(name) for name in instructions}


def phase_of(scope: str) -> tuple[str, str]:
    """ "jit(step)/transpose(jvp(moe))/experts/cond/dot" -> ("moe/experts", "backward").

    What rematerialisation computes again counts as backward. The optimizer has no passes:
    ("optimizer", "").
    """
    parts = re.split(r"[/()]+", scope)  # with the names inside of "jvp(...)" and "transpose(...)"
    if "optimizer" in parts:
        return "optimizer", ""
    way = "backward" if "transpose(" in scope else "forward" if "jvp(" in scope else ""
    if "moe" in parts:
        inner = (part.removeprefix("gather_") for part in parts[parts.index("moe") + 1 :])
        return "moe/" + next((part for part in inner if part in MOE), "other"), way
    return ("attention" if "attention" in parts else "other"), way
