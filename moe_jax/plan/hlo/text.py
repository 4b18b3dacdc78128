"""Reads the text of a compiled program (HLO), and counts how often each part of it runs.

XLA's own cost analysis counts the body of a loop once; here a body counts as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
}
# How a reduction or a sort calls its function of two scalars, which costs nothing here.
SCALARS = "to_apply"
_SHAPE = re.compile(r"\b(pred|bf16|[suc]\d+|f\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# Tuples have tuples in them, and these the tiles of a layout: ((f32[8]{0:T(8)}), f32[8]).
_TUPLE = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_INSTRUCTION = re.compile(rf"^\s+(ROOT )?%?([\w.\-]+) = ({_TUPLE}|\S+) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(calls|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
# Memory space 1 of a TPU is its vector memory; 0 is the HBM.
_FAST_MEMORY = re.compile(r"S\([1-9]\d*\)")


class Array(NamedTuple):
    """The type of a value: no numbers are known."""

    dtype: str
    dims: tuple[int, ...]
    # It lies in the memory of the chip itself, not in the HBM.
    is_on_chip: bool = False

    @property
    def num_bytes(self) -> int:
        # Types of eight bits have many names.
        bits = BITS.get(self.dtype, 8)
        return math.prod(self.dims) * bits // 8


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    outputs: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    # (how, computation): it calls them.
    called: tuple[tuple[str, str], ...]
    # Everything behind the opcode.
    rest: str
    is_root: bool

    @property
    def scope(self) -> str:
        """Returns the path of scopes and functions that it comes from; "" = not known."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, pattern: str) -> str:
        """Returns the first group of a pattern in what follows the operands, "" where it is not."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


class Module(NamedTuple):
    """The instructions of every computation of a program, and which computation it begins with."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


class Runs(NamedTuple):
    """Holds how often each computation runs in one run of the program."""

    times: Mapping[str, int]
    # Scopes of loops whose length depends on the data: their bodies count once.
    unknown_loops: tuple[str, ...]


def read(text: str) -> Module:
    """Returns the module of a text, as `compiled.as_text()` gives it."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            # Long tuples number their entries.
            found = _INSTRUCTION.match(re.sub(r"/\*index=\d+\*/", "", line))
            if found:
                current.append(_instruction(found))
    return Module({name: tuple(lines) for name, lines in computations.items()}, entry)


def _instruction(found: re.Match[str]) -> Instruction:
    """Returns the instruction of a line that _INSTRUCTION matches."""
    root, name, outputs, opcode, rest = found.groups()
    inside, _ = _split_operands(rest)
    called = []
    for how, names in _CALLED.findall(rest):
        # One computation, or {%one, %two} where it branches.
        for one in names.strip("{}").split(","):
            called.append((how, one.strip().lstrip("%")))
    # "to_apply" of a call is a whole computation, that of a reduction a function of two scalars.
    for one in re.findall(r"\bto_apply=%?([\w.\-]+)", rest):
        called.append(("calls" if opcode == "call" else SCALARS, one))
    return Instruction(
        name=name,
        outputs=arrays(outputs),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        called=tuple(called),
        rest=rest,
        is_root=bool(root),
    )


def _split_operands(rest: str) -> tuple[str, str]:
    """Returns what stands before and behind the parenthesis that closes the operands."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def arrays(text: str) -> tuple[Array, ...]:
    """Returns the types that a text names: one, or those of a tuple."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        # A scalar has no dimensions: f32[].
        lengths = tuple(int(length) for length in dims.split(",") if length)
        found.append(Array(dtype, lengths, bool(_FAST_MEMORY.search(layout or ""))))
    return tuple(found)


def count_runs(
    module: Module,
    dearest: bool = False,
    trips_of: Callable[[Instruction], int | None] = lambda loop: None,
) -> Runs:
    """Returns how often every computation runs.

    `trips_of` tells how often a loop runs whose length the program does not say; None = unknown.

    Of branches the shortest runs: work that only some loads need, such as further rounds of a
    dispatcher, is behind the longer one. `dearest`: the longest.
    """
    times: Counter[str] = Counter()
    unknown: list[str] = []

    def visit(name: str, runs: int) -> None:
        times[name] += runs
        for instruction in module.computations[name]:
            trips = 1
            if instruction.opcode == "while":
                known = _trips(module, instruction)
                # Of some loops the caller knows what the program does not say.
                if known is None:
                    known = trips_of(instruction)
                if known is None:
                    unknown.append(instruction.scope)
                trips = 1 if known is None else known
            for called in _entered(module, instruction, dearest):
                visit(called, runs * trips)

    visit(module.entry, 1)
    return Runs(times, tuple(unknown))


def _entered(module: Module, instruction: Instruction, dearest: bool) -> list[str]:
    """Returns the computations that an instruction runs."""
    called = [
        name for how, name in instruction.called if name in module.computations and how != SCALARS
    ]
    # All of them but for a choice between branches.
    if instruction.opcode != "conditional" or not called:
        return called
    choose = max if dearest else min
    return [choose(called, key=lambda name: _size(module, name))]


def _size(module: Module, name: str) -> int:
    """Returns the number of instructions of a computation, with those that it calls."""
    total = 0
    for instruction in module.computations[name]:
        total += 1
        for _, called in instruction.called:
            total += _size(module, called) if called in module.computations else 0
    return total


def _trips(module: Module, loop: Instruction) -> int | None:
    """Returns how often a loop runs; None where it depends on the data."""
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    # A counter that is compared with a constant: a TPU's programs do not write the trips down.
    conditions = [name for how, name in loop.called if how == "condition"]
    constants: list[int] = []
    compares = False
    while conditions:
        for instruction in module.computations.get(conditions.pop(), ()):
            if instruction.opcode == "constant" and instruction.outputs[0].dims == ():
                value = re.match(r"(\d+)\)", instruction.rest)
                constants += [int(value[1])] if value else []
            compares |= "direction=LT" in instruction.rest
            conditions += [name for _, name in instruction.called]
    return max(constants) if compares and constants else None
