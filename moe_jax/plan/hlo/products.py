"""FLOPs of the matrix products of a compiled program, by the part of the model that they are of."""

import math
import re
from collections import Counter
from typing import NamedTuple

from moe_jax.plan.hlo import scopes
from moe_jax.plan.hlo.text import Array, Instruction, Module, Runs

OTHER, EXPERTS = "other", "routed experts"
JOINS, LATENT = "joins of further tokens", "latent projections"
# What stands in the scope of an instruction -> the part of the model, the first that fits. Names in
# capitals are those of einsums.
PARTS = (
    ("optimizer", "optimizer"),
    ("ragged_dot", EXPERTS),
    ("ragged-dot", EXPERTS),
    ("/experts/", EXPERTS),
    ("/route/", "routers"),
    ("/latent/", LATENT),
    ("/dispatch/", "dispatch"),
    ("/combine/", "dispatch"),
    ("attention", "attention scores"),
    ("in_projection", "attention projections"),
    ("out_projection", "attention projections"),
    ("BSD,DQ->BSQ", "attention projections"),
    ("feed_forward", "dense and shared"),
    ("BSF,FD->BSD", "dense and shared"),
    ("mtp", JOINS),
    ("head", "head"),
)
WEIGHT_GRADIENTS = "transpose(jvp(moe))/ragged_dot/dense gradient of weights"


class Products(NamedTuple):
    """FLOPs of one device in one run of the program."""

    flops: Counter[str]
    # The same by scope: the end of the path of functions that a product comes from.
    scopes: Counter[str]
    # Kernels that say nothing of their FLOPs, which are not counted: how often those of each part
    # of the model run.
    unknown: Counter[str]
    # Of `flops` what kernels say themselves (pl.CostEstimate): of all rows that they are given.
    told: Counter[str] = Counter()


def part_of(scope: str) -> str:
    """Returns the part of the model that a scope is of."""
    path = f"/{scope}/"
    for words, part in PARTS:
        if words in path:
            return part
    return OTHER


def count(module: Module, runs: Runs, find: scopes.Find) -> Products:
    """Returns the FLOPs of all products, a multiply-add being two."""
    flops: Counter[str] = Counter()
    by_scope: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for name, instructions in module.computations.items():
        # A computation that is never called, or whose loop runs as often as nobody knows.
        times = runs.times.get(name, 0)
        if not times:
            continue
        types = {instruction.name: instruction.outputs for instruction in instructions}
        for instruction in instructions:
            operands = [types[one][0] for one in instruction.operands if types.get(one)]
            found = _of_instruction(instruction, operands)
            if found == 0:
                continue
            scope = WEIGHT_GRADIENTS if _is_ragged(instruction) else find(instruction.name)
            if found is None:
                unknown[part_of(scope)] += times
            else:
                flops[part_of(scope)] += times * found
                if _told(instruction):
                    told[part_of(scope)] += times * found
                by_scope[scopes.short(scope)] += times * found
    return Products(flops, by_scope, unknown, told)


def _is_ragged(instruction: Instruction) -> bool:
    """Returns whether this is the gradient of the weights of `ragged_dot`, [e, D, F].

    A TPU makes it a dense product, e times the useful work, and forgets where it comes from.
    """
    return not instruction.scope and len(instruction.outputs[0].dims) == 3


def _of_instruction(instruction: Instruction, operands: list[Array]) -> int | None:
    """Returns the FLOPs of an instruction; 0 of what is no product; None where nobody knows."""
    if instruction.opcode == "dot":
        return _dot(instruction.outputs[0], operands[0], instruction.rest)
    if instruction.opcode == "convolution":
        return _convolution(instruction.outputs[0], operands[0], operands[1], instruction)
    if instruction.opcode == "custom-call":
        return _custom_call(instruction, operands)
    return 0


def _dot(output: Array, left: Array, text: str) -> int:
    """Returns the FLOPs of a dot: each number of the output is a sum over contracted dimensions."""
    # Dots and custom calls of libraries write it differently.
    found = re.search(r"lhs_contracting_dim(?:ension)?s\"?[=:][{\[]([\d,\"]*)[}\]]", text)
    contracted = re.findall(r"\d+", found[1]) if found else []
    return 2 * math.prod(output.dims) * math.prod(left.dims[int(dim)] for dim in contracted)


def _convolution(output: Array, left: Array, right: Array, instruction: Instruction) -> int:
    """Returns the FLOPs of a convolution: a TPU's products are such, and a batch dimension is one
    that is dilated.

    Of every spatial dimension only the pairs of positions count in which both sides have a number.
    """
    labels = re.search(r"dim_labels=([^_\s]+)_([^\->\s]+)->([^,\s]+)", instruction.rest)
    if not labels:
        return 0
    left_labels, right_labels, output_labels = labels.groups()
    spatial = sorted(label for label in output_labels if label.isdigit())
    window = _window(instruction, len(spatial))
    pairs = 1
    for place, label in enumerate(spatial):
        pairs *= _pairs(
            output.dims[output_labels.index(label)],
            left.dims[left_labels.index(label)],
            right.dims[right_labels.index(label)],
            {name: values[place] for name, values in window.items()},
        )
    batch = output.dims[output_labels.index("b")]
    features = output.dims[output_labels.index("f")]
    return 2 * pairs * batch * features * right.dims[right_labels.index("i")]


def _window(instruction: Instruction, num_spatial: int) -> dict[str, list[int]]:
    """Returns stride, dilations and low padding of every spatial dimension."""
    text = instruction.attribute(r"window=\{([^}]*)\}")
    given = dict(entry.split("=", 1) for entry in text.split())
    window: dict[str, list[int]] = {}
    for name, default in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0)):
        values = given.get(name, "").split("x") if name in given else [str(default)] * num_spatial
        # Padding is low_high, and only the low end moves what meets what.
        window[name] = [int(value.split("_")[0]) for value in values]
    return window


def _pairs(num_outputs: int, num_inputs: int, size: int, window: dict[str, int]) -> int:
    """Returns how many (output, tap) pairs of one dimension read a number that is there."""
    dilation, last = window["lhs_dilate"], (num_inputs - 1) * window["lhs_dilate"]
    # Counting pair by pair would take longer than it is worth: there are no more than so many.
    if num_outputs * size > 4_000_000:
        return num_outputs * min(size, num_inputs)
    pairs = 0
    for tap in range(size):
        first = tap * window["rhs_dilate"] - window["pad"]
        for output in range(num_outputs):
            place = output * window["stride"] + first
            pairs += 0 <= place <= last and place % dilation == 0
    return pairs


def _custom_call(instruction: Instruction, operands: list[Array]) -> int | None:
    """Returns the FLOPs of a call of a library or a kernel; None where nobody knows."""
    target = _target(instruction)
    if told := _told(instruction):
        return told
    # Without scalars and indices.
    matrices = [array for array in operands if len(array.dims) >= 2 and array.dtype != "s32"]
    if target.startswith("__cublas"):
        return _dot(instruction.outputs[0], operands[0], instruction.rest)
    if target.startswith("__onednn$matmul"):
        return 2 * math.prod(instruction.outputs[0].dims) * matrices[0].dims[-1]
    # The kernel that XLA's TPU compiler makes of `ragged_dot`: [R, D] times one of [e, D, F].
    if instruction.name.startswith("ragged-dot") and "metadata" not in instruction.name:
        return _ragged(instruction.outputs, matrices)
    if target in ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"):
        # A kernel that prepares the list of another one computes no products.
        return 0 if "metadata" in instruction.name else None
    return 0


def _told(instruction: Instruction) -> int:
    """Returns the FLOPs that a kernel says that it costs (pl.CostEstimate); 0 = it does not."""
    if instruction.opcode != "custom-call":
        return 0
    return int(instruction.attribute(r'cost_estimate[^}]*?flops\\?"?:\s*\\?"?(\d+)') or 0)


def _ragged(outputs: tuple[Array, ...], matrices: list[Array]) -> int:
    """Returns the FLOPs of a grouped product: every row of the buffer meets one matrix, whichever
    it is.
    """
    if len(matrices) < 2 or not outputs:
        return 0
    rows = matrices[0].dims[0]
    return 2 * rows * matrices[0].dims[1] * outputs[0].dims[-1]


def _target(instruction: Instruction) -> str:
    """Returns the name of what a custom call calls."""
    return instruction.attribute(r'custom_call_target="([^"]*)"')
