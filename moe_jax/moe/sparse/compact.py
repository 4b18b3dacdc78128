"""What can be taken out of trained experts without changing what they compute.

NumPy, on the host, one model at a time.

Shapes: E experts, D model, P gate and up (or one), F hidden units.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.moe.sparse import stored

Layer = Mapping[str, Any]  # w_in [E, D, P, F], w_out [E, F, D]
# Block side: stored share up to which blocks are faster than whole matrices on a CPU
# (docs/sparse_weights.md); never below 32.
PAYS = {32: 0.25, 64: 0.4, 128: 0.5}


class Blocks(NamedTuple):
    """How many blocks of side `block` a column of each matrix has at most, and the share of all
    that is stored then.
    """

    block: int
    w_in: int
    w_out: int
    share: float


def living(layer: Layer) -> np.ndarray:
    """Units that do something [E, F]: a zero row of w_out does not, nor a zero column of gate or
    up, for act(0) = 0 and 0 * up = 0.
    """
    return (layer["w_in"] != 0).any(1).all(1) & (layer["w_out"] != 0).any(2)


def least_hidden(layers: Iterable[Layer]) -> int:
    """The width that the fullest expert of all layers needs, at least 1."""
    return max(1, *(int(living(layer).sum(1).max()) for layer in layers))


def widths(least: int, hidden: int, multiple: int, shared: int) -> Iterator[int]:
    """Widths from `least` to `hidden` that a model may have: a multiple; and `shared` experts of
    the old width must be some of the new.
    """
    for width in range(least, hidden + 1):
        if width % multiple == 0 and shared * hidden % width == 0:
            yield width


def narrow(layer: Layer, hidden: int) -> dict[str, np.ndarray]:
    """The layer with its living units alone, in their order, filled up to `hidden` with zeros."""
    here = living(layer)
    order = np.argsort(~here, axis=1, kind="stable")[:, :hidden]  # [E, hidden]: the living first
    keep = np.take_along_axis(here, order, 1)
    w_in = np.take_along_axis(layer["w_in"], order[:, None, None], 3) * keep[:, None, None]
    w_out = np.take_along_axis(layer["w_out"], order[..., None], 1) * keep[..., None]
    return {"w_in": w_in.astype(layer["w_in"].dtype), "w_out": w_out.astype(layer["w_out"].dtype)}


def blocks(layers: Iterable[Layer], block: int) -> Blocks:
    """Returns what it takes to store all layers as blocks: as many for every column as the fullest
    has.
    """
    most, sizes = dict.fromkeys(stored.NAMES, 1), {}
    for layer in layers:
        for name, matrix in matrices(layer).items():
            most[name] = max(most[name], int(stored.used(matrix, block).sum(2).max()))
            sizes[name] = matrix.shape
    held = sum(most[name] * block * sizes[name][2] for name in most)
    return Blocks(
        block, most["w_in"], most["w_out"], held / sum(math.prod(s[1:]) for s in sizes.values())
    )


def pays(block: int) -> float:
    """The largest stored share at which blocks are faster: that of the next smaller side that was
    measured, or 0.
    """
    return max((limit for side, limit in PAYS.items() if side <= block), default=0.0)


def packed(layer: Layer, form: Blocks) -> dict[str, dict[str, np.ndarray]]:
    """{"experts": values, "places": places} of a layer (sparse/stored.py)."""
    both = {
        n: stored.pack(matrix, form.block, getattr(form, n))
        for n, matrix in matrices(layer).items()
    }
    return {
        part: {n: pair[i] for n, pair in both.items()}
        for i, part in enumerate(("experts", "places"))
    }


def matrices(layer: Layer) -> dict[str, np.ndarray]:
    """[E, I, O] each; gate and up side by side."""
    return {name: layer[name].reshape(*layer[name].shape[:2], -1) for name in stored.NAMES}


def nonzero(layers: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """(entries that are not zero, all entries)."""
    arrays = [x for layer in layers for x in layer.values()]
    return sum(int(np.count_nonzero(x)) for x in arrays), sum(x.size for x in arrays)
