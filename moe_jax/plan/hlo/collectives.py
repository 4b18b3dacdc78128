"""The collectives of a compiled program: over which mesh axes, how often, how many bytes, and
whether the device goes on computing meanwhile.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.pipeline.ring import TO_STAGE
from moe_jax.plan.hlo import scopes
from moe_jax.plan.hlo.text import Array, Instruction, Module, Runs

# How often the bytes of the larger side of a collective pass a device: an all-reduce is a
# reduce-scatter and an all-gather (Thakur et al. 2005).
PASSES = {
    "all-gather": 1,
    "all-reduce": 2,
    "all-to-all": 1,
    "collective-broadcast": 1,
    "collective-permute": 1,
    "ragged-all-to-all": 1,
    "reduce-scatter": 1,
}
# Keys and values of whole rows, where the tokens of rows are split over `seq`.
KEYS = "keys and values"
# Micro-batches between the stages of a pipeline.
ACTIVATIONS = "activations"
# What stands in the scope of a collective -> what it carries, the first that fits.
CARGO = (
    ("gather_experts", "expert weights"),
    ("gather_weights", "dense weights"),
    ("gather_keys", KEYS),
    ("order_rows", "order of rows"),
    ("/dispatch/", "tokens"),
    ("/combine/", "tokens"),
    ("/route/", "routing"),
    ("optimizer", "norms"),
    (f"/{TO_STAGE}/", ACTIVATIONS),
)
# Sums over rows of what every device computed for its own: gradients, and the loss.
GRADIENTS = "gradients and sums"
# Sums over the hidden columns, which are split over this axis alone.
COLUMNS_AXIS, COLUMNS = "model", "hidden columns"


class Collective(NamedTuple):
    """All collectives of one kind, over the same axes, that carry the same."""

    kind: str
    # Mesh axes, joined by " x "; "" where the groups are those of no axes.
    axes: str
    # Devices that take part together.
    group: int
    cargo: str
    is_async: bool
    # In one run of the program.
    count: int
    # That one device receives from others in one run of the program.
    num_bytes: int
    # Of them, what comes from other slices or hosts; None = it was not asked for.
    far: int | None = None


def find(
    module: Module, runs: Runs, lengths: Mapping[str, int], domains: Sequence[int] = ()
) -> list[Collective]:
    """Returns the collectives of a program on a mesh of these lengths, the most bytes first.

    `domains`: the slice or host of each device, in the order of the mesh; () = one for all. A
    program for several TPU slices is that of one slice, and what crosses is messages.
    """
    totals: dict[tuple[str, str, int, str, bool], list[int]] = {}
    scope_of = _scopes(module)
    messages = list(_messages(module, runs, lengths, domains, scope_of))
    if messages:
        across = _across(lengths, domains)
        num_slices = len(set(domains))
        lengths = {
            axis: length // num_slices if axis == across else length
            for axis, length in lengths.items()
        }
        domains = ()
    for name, instructions in module.computations.items():
        times = runs.times.get(name, 0)
        if not times:
            continue
        starts = any("AsyncCollectiveStart" in one.rest for one in instructions)
        ends = any("AsyncCollectiveDone" in one.rest for one in instructions)
        # A TPU fuses parts of an asynchronous collective with what is computed meanwhile, and
        # writes the collective again in each: only where it starts it counts.
        if name.startswith("async_collective_fusion") or (ends and not starts):
            continue
        types = {instruction.name: instruction.outputs for instruction in instructions}
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in PASSES or instruction.opcode.endswith("-done"):
                continue
            axes, members = _groups(instruction, lengths)
            group = len(members)
            if group == 1:
                continue
            kind = _as_scattered(kind, name)
            is_async = starts or instruction.opcode.endswith("-start")
            key = (kind, axes, group, _cargo(scope_of(instruction, name), axes), is_async)
            num_bytes = times * _received(kind, instruction, types, group)
            total = totals.setdefault(key, [0, 0, 0])
            total[0] += times
            total[1] += num_bytes
            total[2] += num_bytes * _num_far(members, domains) // (group - 1)
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found + messages, key=lambda one: -one.num_bytes)


def _num_far(members: Sequence[int], domains: Sequence[int]) -> int:
    """Returns how many devices of a group are not in the slice or host of the first."""
    if not domains:
        return 0
    return sum(domains[device] != domains[members[0]] for device in members)


def _across(lengths: Mapping[str, int], domains: Sequence[int]) -> str:
    """Returns the axes of a mesh along which devices are in different slices."""
    places = np.asarray(domains).reshape(tuple(lengths.values()))
    crossing = {
        axis for dim, axis in enumerate(lengths) if (places != np.take(places, [0], axis=dim)).any()
    }
    return _joined(crossing, lengths)


def _messages(
    module: Module,
    runs: Runs,
    lengths: Mapping[str, int],
    domains: Sequence[int],
    scope_of: Callable[[Instruction, str], str],
) -> Iterable[Collective]:
    """Yields what TPU slices send each other: pairs of a send and a recv of one rendezvous.

    The larger of the two has what all slices give, as in a collective. The first number of a ragged
    message is the data; the others are offsets and sizes.
    """
    found: dict[str, list[tuple[Instruction, str]]] = {}
    for name, instructions in module.computations.items():
        for one in instructions:
            transfer = one.attribute(r'_xla_megascale_transfer_type="(\w+)"')
            is_data = one.attribute(r'ragged_operand_index="(\d+)"') in ("", "0")
            if one.opcode in ("send", "recv") and transfer and is_data:
                meeting = one.attribute(r'_xla_host_transfer_rendezvous="([^"]+)"')
                found.setdefault(meeting, []).append((one, name))
    num_slices = len(set(domains))
    totals: dict[tuple[str, str], list[int]] = {}
    for sides in found.values():
        first, computation = sides[0]
        kind = first.attribute(r'transfer_type="(\w+)"').lower().replace("_", "-")
        times = runs.times.get(computation, 0)
        sizes = [one.outputs[0].num_bytes for one, _ in sides]
        whole = min(sizes) if kind.startswith("ragged") else max(sizes)
        # A send stands in no scope: what surrounds it or its recv may say what it is.
        cargos = [_cargo(scope_of(one, where), "") for one, where in sides]
        cargo = next((one for one in cargos if one != GRADIENTS), GRADIENTS)
        total = totals.setdefault((kind, cargo), [0, 0])
        total[0] += times
        total[1] += times * PASSES.get(kind, 1) * whole * (num_slices - 1) // num_slices
    across = _across(lengths, domains) if totals else ""
    for (kind, cargo), (count, num_bytes) in totals.items():
        if count:
            yield Collective(kind, across, num_slices, cargo, True, count, num_bytes, far=num_bytes)


def _scopes(module: Module) -> Callable[[Instruction, str], str]:
    """Returns a function from an instruction and its computation to its scope."""
    find = scopes.finder(scopes.instructions_of(module))
    fusions = {
        called: instruction.name
        for instructions in module.computations.values()
        for instruction in instructions
        if instruction.opcode == "fusion"
        for _, called in instruction.called
    }

    def scope_of(instruction: Instruction, computation: str) -> str:
        # What surrounds a fusion says more than what is inside of it.
        return instruction.scope or find(fusions.get(computation, instruction.name))

    return scope_of


def _cargo(scope: str, axes: str) -> str:
    """Returns what a collective carries."""
    if axes == COLUMNS_AXIS and "gather" not in scope:
        return COLUMNS
    path = f"/{scope}/"
    return next((cargo for words, cargo in CARGO if words in path), GRADIENTS)


def _as_scattered(kind: str, computation: str) -> str:
    """Returns the kind of a collective. A TPU writes a fused reduce-scatter as an all-reduce of
    which each device keeps a part.
    """
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        return "reduce-scatter"
    return kind


def _received(
    kind: str, instruction: Instruction, types: Mapping[str, Sequence[Array]], group: int
) -> int:
    """Returns the bytes that a device receives: of n equal parts of the larger side it has one."""
    outputs = list(instruction.outputs)
    inputs = [array for name in instruction.operands for array in types.get(name, ())]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, ...): the result of an asynchronous start has both.
        outputs = outputs[len(inputs) : 2 * len(inputs)] or outputs
    if kind == "ragged-all-to-all":
        return _ragged(instruction, types, group)
    larger = max(sum(array.num_bytes for array in side) for side in (inputs, outputs))
    if kind == "collective-permute":
        return larger
    return PASSES[kind] * larger * (group - 1) // group


def _ragged(instruction: Instruction, types: Mapping[str, Sequence[Array]], group: int) -> int:
    """Returns the bytes of a ragged all-to-all, of which the program says where they may lie, and
    not how many there are: those of a balanced load, which fill the smaller of what is sent from
    and what is received into.
    """
    sides = [sum(array.num_bytes for array in types.get(name, ())) for name in instruction.operands]
    return min(sides[:2]) * (group - 1) // group


def _groups(instruction: Instruction, lengths: Mapping[str, int]) -> tuple[str, list[int]]:
    """Returns the axes that the groups of a collective are of, and the devices of one of them."""
    if "collective-permute" in instruction.opcode:
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=(\S+)"))
        varying = {axis for pair in pairs for axis in _varying(map(int, pair), lengths)}
        first = [int(device) for device in pairs[0]] if varying else [0]
        return _joined(varying, lengths), first
    members = first_group(instruction.rest, lengths)
    return _joined(_varying(members, lengths), lengths), members


def _joined(axes: set[str], lengths: Mapping[str, int]) -> str:
    return " x ".join(axis for axis in lengths if axis in axes)


def first_group(text: str, lengths: Mapping[str, int]) -> list[int]:
    """Returns the devices of the first group that a collective names; all of them for no group.

    Groups are written as lists, {{0,1},{2,3}}; as an iota that is reshaped and transposed,
    [2,4]<=[4,2]T(1,0); or as axes of a mesh, mesh['a'=4,'b'=2] {'a'}.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return [int(device) for device in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape = [int(length) for length in iota[3].split(",")]
        devices = np.arange(np.prod(shape)).reshape(shape)
        if iota[4]:
            devices = devices.transpose([int(dim) for dim in iota[4].split(",")])
        return devices.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if mesh:
        return _of_mesh(mesh[1], mesh[2])
    return list(range(int(np.prod(list(lengths.values())))))


def _of_mesh(written: str, chosen: str) -> list[int]:
    """Returns the first group of a mesh ('a'=4,'b'=2) over some of its axes ('a')."""
    sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", written))
    wanted = re.findall(r"'?([\w.]+)'?", chosen)
    devices = np.arange(int(np.prod([int(size) for size in sizes.values()])))
    devices = devices.reshape([int(size) for size in sizes.values()])
    # Of the axes that are not chosen, the first place.
    index = tuple(slice(None) if axis in wanted else 0 for axis in sizes)
    return devices[index].ravel().tolist()


def _varying(devices: Iterable[int], lengths: Mapping[str, int]) -> set[str]:
    """Returns the axes along which devices of a mesh have different places."""
    places = np.array(np.unravel_index(list(devices), tuple(lengths.values())))
    differs = (places != places[:, :1]).any(axis=1)
    return {axis for axis, is_different in zip(lengths, differs, strict=True) if is_different}
