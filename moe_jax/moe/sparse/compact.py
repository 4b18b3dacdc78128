"""What can be taken out of trained experts without changing what they compute.

NumPy, on the host, one model at a time.

Shapes: E experts, D model, P gate and up (or one), F hidden units.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.moe.sparse import stored

# w_in [E, D, P, F], w_out [E, F, D].
Layer = Mapping[str, Any]
# Block side: stored share up to which blocks are faster than whole matrices on a CPU
# (docs/sparse_weights.md); never below 32.
PAYS = {32: 0.25, 64: 0.4, 128: 0.5}


class Blocks(NamedTuple):
    """Holds how many blocks a column of each matrix has at most, and the stored share."""

    block: int
    w_in: int
    w_out: int
    share: float


def living(layer: Layer) -> np.ndarray:
    """Returns which hidden units do something [E, F]."""
    # A zero row of w_out does not, nor a zero column of gate or up, for act(0) = 0 and 0 * up = 0.
    reads_EPF = (layer["w_in"] != 0).any(axis=1)
    writes_EF = (layer["w_out"] != 0).any(axis=2)
    return reads_EPF.all(axis=1) & writes_EF


def least_hidden(layers: Iterable[Layer]) -> int:
    """Returns the width that the fullest expert of all layers needs, at least 1."""
    least = 1
    for layer in layers:
        num_living_E = living(layer).sum(axis=1)
        least = max(least, int(num_living_E.max()))
    return least


def widths(least: int, hidden: int, multiple: int, shared: int) -> Iterator[int]:
    """Yields the widths from `least` to `hidden` that a model may have.

    They are multiples, and `shared` experts of the old width must be some of the new.
    """
    for width in range(least, hidden + 1):
        if width % multiple == 0 and shared * hidden % width == 0:
            yield width


def narrow(layer: Layer, hidden: int) -> dict[str, np.ndarray]:
    """Returns the layer with its living units alone, in their order.

    It is filled up to `hidden` with zeros.
    """
    is_living_EF = living(layer)
    # A stable sort of booleans: the living units first, in their order.
    order_EF = np.argsort(~is_living_EF, axis=1, kind="stable")[:, :hidden]
    keep_EF = np.take_along_axis(is_living_EF, order_EF, 1)
    w_in = np.take_along_axis(layer["w_in"], order_EF[:, None, None], 3)
    w_out = np.take_along_axis(layer["w_out"], order_EF[..., None], 1)
    # Units that fill up an expert with fewer are dead ones: their weights become zeros.
    w_in = w_in * keep_EF[:, None, None]
    w_out = w_out * keep_EF[..., None]
    return {"w_in": w_in.astype(layer["w_in"].dtype), "w_out": w_out.astype(layer["w_out"].dtype)}


def blocks(layers: Iterable[Layer], block: int) -> Blocks:
    """Returns what it takes to store all layers as blocks.

    Every column gets as many as the fullest has.
    """
    # At least one block, so that no array is empty.
    most, shapes = dict.fromkeys(stored.NAMES, 1), {}
    for layer in layers:
        for name, matrix in matrices(layer).items():
            blocks_of_column = stored.used(matrix, block).sum(2)
            most[name] = max(most[name], int(blocks_of_column.max()))
            shapes[name] = matrix.shape
    # Entries of one expert, as blocks and as whole matrices.
    num_stored, num_whole = 0, 0
    for name, (_, num_inputs, num_outputs) in shapes.items():
        # n blocks of b x b for each of O / b columns are n b O entries.
        num_stored += most[name] * block * num_outputs
        num_whole += num_inputs * num_outputs
    return Blocks(block, most["w_in"], most["w_out"], num_stored / num_whole)


def pays(block: int) -> float:
    """Returns the largest stored share at which blocks are faster.

    It is that of the next smaller side that was measured, or 0.
    """
    return max((limit for side, limit in PAYS.items() if side <= block), default=0.0)


def packed(layer: Layer, form: Blocks) -> dict[str, dict[str, np.ndarray]]:
    """Returns {"experts": values, "places": places} of a layer (sparse/stored.py)."""
    values, places = {}, {}
    for name, matrix in matrices(layer).items():
        num_blocks = getattr(form, name)
        values[name], places[name] = stored.pack(matrix, form.block, num_blocks)
    return {"experts": values, "places": places}


def matrices(layer: Layer) -> dict[str, np.ndarray]:
    """Returns each weight as [E, I, O]; gate and up side by side."""
    as_matrices = {}
    for name in stored.NAMES:
        num_experts, num_inputs = layer[name].shape[:2]
        as_matrices[name] = layer[name].reshape(num_experts, num_inputs, -1)
    return as_matrices


def nonzero(layers: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Returns (entries that are not zero, all entries)."""
    num_nonzero, num_entries = 0, 0
    for layer in layers:
        for array in layer.values():
            num_nonzero += int(np.count_nonzero(array))
            num_entries += array.size
    return num_nonzero, num_entries
