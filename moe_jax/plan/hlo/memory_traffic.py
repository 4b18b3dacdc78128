"""Bytes that a compiled program reads from and writes to the memory of a device.

Every instruction that is no part of a fusion reads its operands and writes its result once. A
fusion that takes a slice of an operand reads the slice, one that updates a slice writes the slice:
the stacked weights of a loop over layers would otherwise be read whole in every layer. What lies in
the memory of the chip itself costs nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from moe_jax.plan.hlo import scopes
from moe_jax.plan.hlo.text import Array, Instruction, Module, Runs

# They only name, group or wait for what is there.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "optimization-barrier",
}
_SLICES = {"dynamic-slice", "gather", "slice"}


def count(module: Module, runs: Runs, find: scopes.Find) -> Counter[str]:
    """Returns the bytes of one device in one run of the program, by scope: the end of the path of
    functions that an instruction comes from.
    """
    fused = _fused(module)
    by_scope: Counter[str] = Counter()
    for name, instructions in module.computations.items():
        times = runs.times.get(name, 0)
        if times and name not in fused:
            types = {instruction.name: instruction.outputs for instruction in instructions}
            for one in instructions:
                if moved := _moved(one, types, module):
                    by_scope[scopes.short(find(one.name))] += times * moved
    return by_scope


def _fused(module: Module) -> set[str]:
    """Returns the computations inside of fusions: their values never reach the memory."""
    found: set[str] = set()
    # Those that are called from outside, ...
    todo = []
    for instructions in module.computations.values():
        for instruction in instructions:
            if instruction.opcode in ("fusion", "reduce", "sort", "map", "scatter"):
                todo += [name for _, name in instruction.called]
    # ... and all that these call in turn.
    while todo:
        name = todo.pop()
        if name not in found and name in module.computations:
            found.add(name)
            todo += [one for line in module.computations[name] for _, one in line.called]
    return found


def _moved(instruction: Instruction, types: Mapping[str, Sequence[Array]], module: Module) -> int:
    """Returns the bytes that an instruction reads and writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    inputs = [types.get(name, ()) for name in instruction.operands]
    # The slice is read and written; the rest of the array stays where it is.
    if instruction.opcode in _SLICES:
        return 2 * _in_memory(instruction.outputs)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_memory(inputs[1])
    if instruction.opcode == "fusion" and instruction.called:
        body = module.computations.get(instruction.called[0][1], ())
        return _of_fusion(instruction, inputs, body)
    return sum(map(_in_memory, inputs)) + _in_memory(instruction.outputs)


def _in_memory(arrays: Sequence[Array]) -> int:
    """Returns the bytes of arrays, without those that the compiler keeps on the chip."""
    return sum(array.num_bytes for array in arrays if not array.is_on_chip)


def _of_fusion(
    fusion: Instruction, inputs: Sequence[Sequence[Array]], body: Sequence[Instruction]
) -> int:
    """Returns the bytes that a fusion reads of its parameters and writes as its outputs. `body`:
    the instructions inside of it, whose values stay on the chip.
    """
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    read = 0
    for parameter in body:
        if parameter.opcode != "parameter":
            continue
        # "parameter(2)": the number of the operand of the fusion.
        number = int(parameter.rest.partition(")")[0])
        whole = _in_memory(inputs[number]) if number < len(inputs) else 0
        read += min(whole, _read(parameter, users, whole))
    by_name = {instruction.name: instruction for instruction in body}
    written = _in_memory(fusion.outputs)
    for instruction in body:
        if instruction.opcode != "dynamic-update-slice":
            continue
        # In place: of the whole only the slice is written.
        update = by_name.get(instruction.operands[1])
        written -= _in_memory(instruction.outputs)
        written += sum(array.num_bytes for array in update.outputs) if update else 0
    return read + max(written, 0)


def _read(parameter: Instruction, users: Mapping[str, list[Instruction]], whole: int) -> int:
    """Returns the bytes that a fusion reads of a parameter: of slices, those alone."""
    total, todo = 0, [parameter.name]
    while todo:
        name = todo.pop()
        for user in users.get(name, ()):
            # The same bytes under another shape: whoever reads that reads them.
            if user.opcode == "bitcast":
                todo.append(user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += sum(array.num_bytes for array in user.outputs)
            # Written into, and not read.
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            # Any other user reads all of it.
            else:
                return whole
    return total
